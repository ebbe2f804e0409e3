"""Tiny random models of every family, batches for them, and their caches."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fa_ops.integrations.huggingface import ATTENTION_NAME, register_triton_attention

register_triton_attention()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 97
WINDOW = 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
UNTIED = {"tie_word_embeddings": False}  # tied, a random model repeats its last token
SOFTCAP = {"attn_logit_softcapping": 2.0}  # low enough to bend the scores of a random model
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**ALTERNATING, **UNTIED, **SOFTCAP}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**ALTERNATING, **UNTIED}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            **ALTERNATING,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            # The default knows no float64, "eager" no fullgraph.
            "experts_implementation": "batched_mm",
        },
    ),
    "t5gemma": (T5GemmaForConditionalGeneration, T5GemmaConfig, {}),
    "whisper": (WhisperForConditionalGeneration, WhisperConfig, {}),
    "bert": (
        BertForMaskedLM,
        BertConfig,
        {"hidden_size": 64, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    ),
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig,
        {
            "hidden_size": 64,
            "local_attention": 7,  # 3 keys before the query and 3 behind it
            "layer_types": ["sliding_attention", "full_attention"],
            "cls_token_id": 1,
            "sep_token_id": 1,
        },
    ),
}
# Positions that the encoder of a model with a decoder gives.
ENCODER_LENGTH = {"t5gemma": 13, "whisper": 15}

PADDINGS = ("none", "left", "right")
LENGTH = 11
# With right padding no row is full: the batch was padded to a fixed length.
# The last position, whose logits begin a generation, still has a token in its window.
LENGTHS = {"none": (11, 11, 11), "left": (11, 6, 1), "right": (10, 6, 4)}


def tiny_model(family: str, attention: str = ATTENTION_NAME, **changes) -> PreTrainedModel:
    """A model in eval mode. The weights depend on the shapes alone, so that `attention` may be compared."""
    model_class, config_class, own = MODELS[family]
    sizes = {"t5gemma": _t5gemma, "whisper": _whisper}.get(family, _sizes)(**{**own, **changes})
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, attn_implementation=attention)).to(DEVICE).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # initialised to nothing in particular
            nn.init.normal_(parameter)
    return model


def _sizes(**changes) -> dict:
    return {**SIZES, **changes}


def _t5gemma(**changes) -> dict:
    """Encoder and decoder with windows, softcaps and cross-attention."""
    sizes = {**SIZES, **ALTERNATING, **SOFTCAP, **changes}
    return {
        "encoder": sizes, "decoder": {**sizes, "cross_attention_hidden_size": 32}, "vocab_size": VOCABULARY,
        "dropout_rate": 0.0, "classifier_dropout_rate": 0.0, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, **UNTIED,
    }  # fmt: skip


def _whisper(**changes) -> dict:
    return {
        "vocab_size": VOCABULARY, "num_mel_bins": 4, "encoder_layers": 1, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_source_positions": ENCODER_LENGTH["whisper"], "max_target_positions": 64,
        "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1,
        "tie_word_embeddings": False, "suppress_tokens": None, "begin_suppress_tokens": None, **changes,
    }  # fmt: skip


class Batch(NamedTuple):
    ids: Tensor  # (B, S)
    mask: Tensor | None = None  # (B, S) int64, None without padding
    encoder: dict[str, Tensor] | None = None  # what the encoder reads, where `ids` are the decoder's

    @property
    def is_token(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()

    @property
    def labels(self) -> Tensor:
        return self.ids.masked_fill(~self.is_token, -100)

    def inputs(self, chunk: slice = slice(None)) -> dict[str, Tensor]:
        """A model's arguments, for some positions with those before them in a cache."""
        prefix = "decoder_" if self.encoder else ""
        inputs = {**(self.encoder or {}), f"{prefix}input_ids": self.ids[:, chunk]}
        if self.mask is not None:
            inputs[f"{prefix}attention_mask"] = self.mask[:, : chunk.stop]
        return inputs


def batch_of(padding: str, family: str = "llama", length: int = LENGTH, seed: int = 0) -> Batch:
    """Random tokens, (3, S)."""
    batch = Batch(*_tokens(padding, length, seed))
    if family == "whisper":
        features = torch.randn(3, 4, 2 * ENCODER_LENGTH[family], generator=torch.Generator().manual_seed(seed))
        return batch._replace(encoder={"input_features": features.to(DEVICE)})
    if family == "t5gemma":
        ids, mask = _tokens(padding, ENCODER_LENGTH[family], seed)
        return batch._replace(
            encoder={"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        )
    return batch


def _tokens(padding: str, length: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """`LENGTHS` stretched to a length, (3, S), and their mask."""
    lengths = torch.tensor([max(n * length // LENGTH, 1) for n in LENGTHS[padding]])[:, None]
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = torch.randint(2, VOCABULARY, (3, length), generator=generator)
    if padding == "none":
        return ids.to(DEVICE), None
    positions = torch.arange(length)
    mask = positions >= length - lengths if padding == "left" else positions < lengths
    return ids.to(DEVICE), mask.long().to(DEVICE)


def mixed_batch(seed: int = 1) -> Batch:
    """Padding before the tokens of a row, behind them, in between, and none."""
    ids, _ = _tokens("none", LENGTH, seed)
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 8 + [0] * 3, [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1]], device=DEVICE)
    return Batch(ids, mask)


def cache_of(kind: str, model: PreTrainedModel, length: int = 24) -> DynamicCache | StaticCache | EncoderDecoderCache:
    """A cache as `generate` makes it, static ones with room for `length` positions."""
    config = model.config.get_text_config(decoder=True)
    cache = _cache(kind, config, length)
    if not model.config.is_encoder_decoder:
        return cache
    # Cross-attention has no window, whatever the decoder's layers have.
    config = copy.deepcopy(config)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    return EncoderDecoderCache(cache, _cache(kind, config, ENCODER_LENGTH[model.config.model_type]))


def _cache(kind: str, config: PreTrainedConfig, length: int) -> DynamicCache | StaticCache:
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)
