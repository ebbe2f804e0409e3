"""What the rules of `shrinking.py` cannot know, as data: fields of configurations by model type.

A value that can be called is called for each model. They hold wherever a configuration of the type stands; a dictionary
under the name of a part holds for that part alone.
"""

from typing import Any

from transformers import ResNetConfig


def backbone(out: int = 4) -> ResNetConfig:
    """Convolutions without attention, for detectors whose own backbone needs another library."""
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, layer_type="basic",
        out_features=[f"stage{i + 1}" for i in range(4)][-out:],
    )  # fmt: skip


TIMM_BACKBONE = {"use_timm_backbone": False, "backbone_config": backbone, "backbone": None, "use_pretrained_backbone": False}
IMAGE_QUERIES = {"image_token_index": 100, "num_query_tokens": 4}
VIDEO_QUERIES = {**IMAGE_QUERIES, "video_token_index": 101}
HGNET = {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [64] * 3}
RT_DETR = {"backbone_config": lambda: backbone(3), "encoder_in_channels": [16, 32, 32], "decoder_in_channels": [64] * 3}
EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1}


def rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Rotary embedding of positions in time, height and width: half of the rotated dimensions, divided among them."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **others}
    return {"rope_parameters": parameters}


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION_TOKENS = {"vision_start_token_id": 120, "vision_end_token_id": 121, "audio_start_token_id": 122, "audio_end_token_id": 123}
ROPE_OF_16, ROPE_OF_8 = rope(2, 3, 3), rope(1, 1, 2, partial_rotary_factor=0.5)
SHARED_KEYS = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    # Positions in three dimensions.
    "qwen2_vl_text": ROPE_OF_16,
    "qwen2_5_vl_text": ROPE_OF_16,
    "qwen2_5_omni_text": ROPE_OF_16,
    "qwen2_5_omni_talker": ROPE_OF_16,
    "paddleocr_vl_text": ROPE_OF_16,
    "hunyuan_vl_text": ROPE_OF_16,
    "qwen3_vl_text": ROPE_OF_16,
    "qwen3_vl_moe_text": ROPE_OF_16,
    "cosmos3_edge_text": rope(2, 3, 3, rope_theta=10000.0),
    "glm4v_text": ROPE_OF_8,
    "glm4v_moe_text": ROPE_OF_8,
    "glm_image_text": ROPE_OF_8,
    "glm_ocr_text": ROPE_OF_8,
    "ernie4_5_vl_moe_text": rope(3, 3, 2),
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2,
                            "rope_parameters": {"full_attention": {**DEFAULT_ROPE, "mrope_section": [2, 3, 3]}}},
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
    # One value among several depends on another one.
    "mimi": {"upsample_groups": 64, "codebook_size": 64, "layer_scale_initial_scale": 0.5, "upsampling_ratios": [4, 4],
             "vector_quantization_hidden_dimension": 64, "codebook_dim": 64},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 64},
    "bit": {"num_groups": 4},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [32, 64, 64], "num_heads": [1, 2, 4]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "esmfold2": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_hidden_layers": 2, "expert_layer_offset": 1,
              "expert_layer_period": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "xlnet": {"d_head": 16},
    "emu3": {"vocabulary_map": {"<image>": 110, "<|extra_200|>": 111}},
    "chameleon": {"vocabulary_map": {"<image>": 110}},
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "granite_speech5_encoder": {"context_size": 16},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 64]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 16, 16, 32, 32, 64]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "hc_lowrank": 8,
    },
    "efficientloftr": {"out_features": [16, 16, 32, 64], "stage_num_blocks": [1, 1, 1, 1]},
    "lw_detr_vit": {"num_windows": 4, "image_size": 32},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 8], "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "adapter_in_dim": 64,
                                  "adapter_out_dim": 64},
    "granite4_vision": {"downsample_rate": "2/4", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2, "mamba_head_dim": 16},
    "xlstm": {"hidden_size": 64, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 32},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48, "num_attention_heads": 3},
    "codegen": {"rotary_dim": 8},
    "superpoint": {"keypoint_decoder_dim": 65},
    "zamba": {"mamba_expand": 2, "attention_hidden_size": 128, "num_hidden_layers": 6, "attention_head_dim": 32,
              "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"]},
    "janus_vqgan": {"base_channels": 32},
    "perceiver": {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_blocks": 1, "max_position_embeddings": 13,
                  "num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2},
    "sam_vision_model": {"global_attn_indexes": [1], "num_pos_feats": 32},
    "sam2_hiera_det_model": {
        "hidden_size": 16, "image_size": [64, 64], "blocks_per_stage": [1, 1, 1, 1], "embed_dim_per_stage": [16, 32, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [2],
    },
    "sam2_vision_model": {"backbone_channel_list": [64, 32, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 64},
    "llama4_vision_model": {"intermediate_size": 256},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "qwen2_5_omni_thinker": VISION_TOKENS,
    "qwen3_omni_moe_thinker": VISION_TOKENS,
    "hgnet_v2": {
        "stem_channels": [3, 16, 16], "stage_in_channels": [16, 16, 32, 64], "stage_mid_channels": [16] * 4,
        "stage_out_channels": [16, 32, 64, 128], "hidden_sizes": [16, 32, 64, 128], "stage_numb_of_layers": [2] * 4,
        "stage_num_blocks": [1] * 4,
    },
    "d_fine": HGNET, "deimv2": HGNET, "pp_doclayout_v2": HGNET, "pp_doclayout_v3": HGNET, "pp_doclayout_v4": HGNET,
    "rt_detr": RT_DETR, "rt_detr_v2": RT_DETR,
    "step3p5": {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2,
                "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "share_expert_dim": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "longcat_flash": {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4, "head_dim": 16,
                      "qk_head_dim": None, "zero_expert_num": 2},
    "levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "image_size": 64, "patch_size": 16},
    "pvt": {"image_size": 64, "sequence_reduction_ratios": [2, 2, 1, 1]},
    "pix2struct_vision_model": {"seq_len": 16},
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 64, "downsampling_ratios": [2, 4]},
    "align_vision_model": {**EFFICIENTNET, "hidden_dim": 256}, "efficientnet": EFFICIENTNET,
    "tvp": {"backbone_config": lambda: backbone(out=1), "max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "blt": {"num_hidden_layers": 2},
    "zoedepth": {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32, "bottleneck_features": 32},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "vitmatte": {"fusion_hidden_sizes": [32, 16, 16, 16], "convstream_hidden_sizes": [16, 16, 16],
                                           "backbone_config": {"image_size": 64, "patch_size": 16}},
    "blip-2": IMAGE_QUERIES, "instructblip": IMAGE_QUERIES, "instructblipvideo": VIDEO_QUERIES,
    "kosmos-2": {"latent_query_num": 4},
    "clap_audio_model": {"num_mel_bins": 32, "spec_size": 128, "image_size": 128},
    "clvp_encoder": {"num_attention_heads": 2}, "clvp_decoder": {"num_attention_heads": 2},
    "qwen3_asr_encoder": {"n_window": 16},
    "seggpt": {"image_size": [64, 32]},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4}, "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "depth_pro": {"patch_size": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "vits": {"speaking_rate": 1000.0},  # a random model speaks for hours
    "mimi_decoder": {"upsample_groups": 64},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 64},
    # Detectors.
    "conditional_detr": TIMM_BACKBONE,
    "dab-detr": TIMM_BACKBONE,
    "deformable_detr": TIMM_BACKBONE,
    "detr": TIMM_BACKBONE,
    "table-transformer": TIMM_BACKBONE,
}  # fmt: skip

# The class of a family where no rule finds the one that says most.
CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    }
