"""What the rules of `shrinking.py` cannot know, as data: fields of configurations by model type.

They hold wherever a configuration of the type stands; a dictionary under the name of a part holds for that part alone.
A value that can be called is called for each model.
"""

from typing import Any

from transformers import ResNetConfig

# The class of a family where its auto classes name one that says less.
CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}


def backbone(stages: int = 4) -> ResNetConfig:
    """Convolutions without attention that give the last `stages` of four stages."""
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, layer_type="basic",
        out_features=[f"stage{i + 1}" for i in range(4)][-stages:],
    )  # fmt: skip


def rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Rotary embedding of positions in time, height and width: half of the rotated dimensions, divided among them."""
    return {"rope_parameters": {**ROPE, "mrope_section": list(sections), **others}}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_OF_16, ROPE_OF_8 = rope(2, 3, 3), rope(1, 1, 2, partial_rotary_factor=0.5)
SHARED_KEYS = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}

DECODERS: dict[str, dict[str, Any]] = {
    # Positions in three dimensions.
    "qwen2_vl_text": ROPE_OF_16,
    "qwen2_5_vl_text": ROPE_OF_16,
    "qwen2_5_omni_text": ROPE_OF_16,
    "qwen2_5_omni_talker": ROPE_OF_16,
    "qwen3_vl_text": ROPE_OF_16,
    "qwen3_vl_moe_text": ROPE_OF_16,
    "paddleocr_vl_text": ROPE_OF_16,
    "hunyuan_vl_text": ROPE_OF_16,
    "cosmos3_edge_text": ROPE_OF_16,
    "ernie4_5_vl_moe_text": rope(3, 3, 2),
    "glm4v_text": ROPE_OF_8,
    "glm4v_moe_text": ROPE_OF_8,
    "glm_image_text": ROPE_OF_8,
    "glm_ocr_text": ROPE_OF_8,
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2,
        "rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 3, 3]}},
    },
    # Layers that read the keys of other layers, and layers with heads of another size.
    "gemma3n_text": {**SHARED_KEYS, "intermediate_size": 64, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**SHARED_KEYS, "global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "embedding_gemma2_text": {"global_head_dim": 32},
    "diffusion_gemma_text": {"global_head_dim": 32, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 6,
        "mlp_layer_types": ["dense", "sparse"], "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16, "shared_experts_intermediate_size": 32,
    },
    # Kinds of layers.
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "blt": {"num_hidden_layers": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **EXPERTS},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "num_hidden_layers": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 6,
        "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "share_expert_dim": 32,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"], "num_hidden_layers": 6,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    # Numbers that have to fit each other, or that have no default.
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": EXPERTS,
    "dots1": {**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm5_next_text": {"index_topk": 16},
    "longcat_flash": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4, "qk_head_dim": None, "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "hc_lowrank": 8,
    },
    "xlnet": {"d_head": 16},
}  # fmt: skip

SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1}

ENCODERS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "esmfold2": {"num_key_value_heads": 4},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 32},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48, "num_attention_heads": 3},
    "perceiver": {
        "d_model": 32, "d_latents": 32, "num_latents": 8, "num_blocks": 1, "max_position_embeddings": 13,
        "num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 8], "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
    },
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip

CODEC = {"upsample_groups": 64}

AUDIO: dict[str, dict[str, Any]] = {
    "clap_audio_model": {"hidden_size": 512, "num_mel_bins": 32, "spec_size": 128, "image_size": 128},
    "clvp_encoder": {"num_attention_heads": 2},
    "clvp_decoder": {"num_attention_heads": 2},
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 64, "downsampling_ratios": [2, 4]},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "granite_speech5_encoder": {"context_size": 16},
    "mimi": {
        **CODEC, "codebook_size": 64, "codebook_dim": 64, "vector_quantization_hidden_dimension": 64,
        "upsampling_ratios": [4, 4],
    },
    "mimi_decoder": CODEC,
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 64]},
    "pocket_tts_audio_tokenizer": CODEC,
    "pocket_tts_audio_tokenizer_decoder": CODEC,
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vits": {"speaking_rate": 1000.0},  # a random model speaks for hours
}  # fmt: skip

TIMM_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": backbone}
RT_DETR = {
    "backbone_config": lambda: backbone(3), "encoder_in_channels": [16, 32, 32], "decoder_in_channels": [64] * 3,
}  # fmt: skip
HGNET = {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [64] * 3}
EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.3}
QUERIES = {"image_token_index": 100, "video_token_index": 101, "num_query_tokens": 4}
STARTS = {f"{kind}_start_token_id": 120 + i for i, kind in enumerate(("vision", "audio"))}

VISION: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": {**EFFICIENTNET, "hidden_dim": 256},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bit": {"num_groups": 4},
    "blip-2": QUERIES,
    "chameleon": {"vocabulary_map": {"<image>": 110}},
    "conditional_detr": TIMM_BACKBONE,
    "cvt": {"depth": [1, 2, 3], "embed_dim": [32, 64, 64], "num_heads": [1, 2, 4]},
    "d_fine": HGNET,
    "dab-detr": TIMM_BACKBONE,
    "deformable_detr": TIMM_BACKBONE,
    "deimv2": HGNET,
    "detr": TIMM_BACKBONE,
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "adapter_in_dim": 64, "adapter_out_dim": 64,
    },
    "efficientloftr": {"hidden_size": 256, "num_attention_heads": 8, "stage_num_blocks": [1, 1, 1, 1]},
    "efficientnet": {**EFFICIENTNET, "hidden_dim": 320},
    "emu3": {"vocabulary_map": {"<image>": 110, "<|extra_200|>": 111}},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 64},
    "granite4_vision": {
        "downsample_rate": "2/4", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1],
    },
    "hgnet_v2": {
        "stem_channels": [3, 16, 16], "stage_in_channels": [16, 16, 32, 64], "stage_mid_channels": [16] * 4,
        "stage_out_channels": [16, 32, 64, 128], "hidden_sizes": [16, 32, 64, 128], "stage_numb_of_layers": [2] * 4,
        "stage_num_blocks": [1] * 4,
    },
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "kosmos-2": {"latent_query_num": 4},
    "levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "image_size": 64, "patch_size": 16},
    "llama4_vision_model": {"intermediate_size": 256},
    "lw_detr_vit": {"num_windows": 4, "image_size": 32},
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32},
    "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 16, 16, 32, 32, 64]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "pp_formulanet_vision": {"output_channels": 256},
    "slanext_vision": {"output_channels": 256},
    "pix2struct_vision_model": {"seq_len": 16},
    "pp_doclayout_v2": {**HGNET, "class_thresholds": [0.5] * 2, "class_order": [0, 1]},
    "pp_doclayout_v3": {**HGNET, "x4_feat_dim": 16},
    "pp_doclayout_v4": HGNET,
    "pvt": {"image_size": 64, "sequence_reduction_ratios": [2, 2, 1, 1]},
    "qwen2_5_omni_thinker": STARTS,
    "qwen3_omni_moe_thinker": STARTS,
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "sam_vision_model": {"global_attn_indexes": [1], "num_pos_feats": 32},
    "sam2_hiera_det_model": {
        "hidden_size": 16, "image_size": [64, 64], "blocks_per_stage": [1, 2, 2, 1], "global_attention_blocks": [2],
        "embed_dim_per_stage": [16, 32, 48, 64], "num_attention_heads_per_stage": [1, 2, 3, 4],
        "window_size_per_stage": [8, 4, 2, 1],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [64, 48, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    **{f"{sam}_mask_decoder": {"num_attention_heads": 2} for sam in ("sam", "sam_hq", "sam2", "sam3", "sam3_tracker")},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "seggpt": {"image_size": [64, 32]},
    "superpoint": {"keypoint_decoder_dim": 65},
    "table-transformer": TIMM_BACKBONE,
    "tvp": {"backbone_config": lambda: backbone(1), "max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vitmatte": {
        "fusion_hidden_sizes": [32, 16, 16, 16], "convstream_hidden_sizes": [16, 16, 16],
        "backbone_config": {"image_size": 64, "patch_size": 16},
    },
    "zoedepth": {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32, "bottleneck_features": 32},
}  # fmt: skip

CHANGES = DECODERS | ENCODERS | AUDIO | VISION
