"""Tiny random models, batches and the calls that the tests of this folder compare."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
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
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask

from fa_ops.integrations.huggingface import ATTENTION_NAME, register_triton_attention
from tests.support.accuracy import AccuracyError, ErrorPool

register_triton_attention()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 97
WINDOW = 8
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
UNTIED = {"tie_word_embeddings": False}  # tied, a random model repeats its last token
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    # The softcap is low enough to bend the scores of a random model.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**ALTERNATING, **UNTIED, "attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**ALTERNATING, **UNTIED}),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            **ALTERNATING,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            # The default knows no float64, "eager" no fullgraph.
            "experts_implementation": "batched_mm",
        },
    ),
}
WINDOWED = [family for family, (_, _, own) in FAMILIES.items() if "sliding_window" in own]
ENCODERS = {
    "bert": (
        BertConfig,
        BertForMaskedLM,
        {"hidden_size": 64, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    ),
    "modernbert": (
        ModernBertConfig,
        ModernBertForMaskedLM,
        {
            "hidden_size": 64,
            "local_attention": 7,  # 3 keys before the query and 3 behind it
            "layer_types": ["sliding_attention", "full_attention"],
            "cls_token_id": 1,
            "sep_token_id": 1,
        },
    ),
}
PADDINGS = ("none", "left", "right")
# With right padding no row is full: the batch was padded to a fixed length.
# The last position, whose logits begin a generation, still has a token in its window.
LENGTHS = {"none": (11, 11, 11), "left": (11, 6, 1), "right": (10, 6, 4)}


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


def tiny_model(family: str, attention: str = ATTENTION_NAME, **changes) -> PreTrainedModel:
    """A model in eval mode. The weights depend on the shapes alone, so that `attention` may be compared."""
    config_class, model_class, own = {**FAMILIES, **ENCODERS}[family]
    config = config_class(**{**SIZES, "attn_implementation": attention, **own, **changes})
    return _initialised(model_class, config)


def tiny_t5gemma(attention: str = ATTENTION_NAME, **changes) -> PreTrainedModel:
    """Encoder and decoder with windows, softcaps and cross-attention."""
    own = {**SIZES, **ALTERNATING, "attn_logit_softcapping": 2.0, **changes}
    config = T5GemmaConfig(
        encoder=own, decoder={**own, "cross_attention_hidden_size": 32}, vocab_size=VOCABULARY, dropout_rate=0.0,
        classifier_dropout_rate=0.0, attn_implementation=attention, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return _initialised(T5GemmaForConditionalGeneration, config)


def tiny_whisper(attention: str = ATTENTION_NAME) -> PreTrainedModel:
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=4, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=15,
        max_target_positions=64, init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, tie_word_embeddings=False, suppress_tokens=None, begin_suppress_tokens=None,
        attn_implementation=attention,
    )  # fmt: skip
    return _initialised(WhisperForConditionalGeneration, config)


def _initialised(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config).to(DEVICE).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # initialised to nothing in particular
            nn.init.normal_(parameter)
    return model


def families_of(*fast: str) -> list:
    """All families of decoders, those that are not named being slow."""
    return [family if family in fast else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


class Batch(NamedTuple):
    ids: Tensor  # (B, S)
    mask: Tensor | None  # (B, S) int64, None without padding

    @property
    def is_token(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()

    @property
    def labels(self) -> Tensor:
        return self.ids.masked_fill(~self.is_token, -100)


def batch_of(padding: str, length: int | None = None) -> Batch:
    """Random tokens, (3, S); `length` stretches the batch of 11 positions."""
    lengths = LENGTHS[padding] if length is None else tuple(max(n * length // 11, 1) for n in LENGTHS[padding])
    size = 11 if length is None else length
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(2, VOCABULARY, (3, size), generator=generator)
    if padding == "none":
        return Batch(ids.to(DEVICE), None)
    positions = torch.arange(size)
    offset = torch.tensor(lengths)[:, None]
    mask = positions >= size - offset if padding == "left" else positions < offset
    return Batch(ids.to(DEVICE), mask.long().to(DEVICE))


def twins(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with eager attention, in the model's dtype; and with exact attention, in float64."""
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    exact.set_attn_implementation("exact")
    return eager, exact


def exact_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs
) -> tuple[Tensor, None]:
    """Transformers' eager attention computes its softmax in float32, and in float64 gives NaN for left padding."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    sink = scores.new_full((1,), -torch.inf) if s_aux is None else s_aux
    sink = sink.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    scores = torch.cat((scores, sink), dim=-1)
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    weights = scores.where(sees, 0.0).softmax(-1).where(sees, 0.0)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


def exact_mask(**kwargs):
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", exact_mask)


def cache_of(kind: str, model: PreTrainedModel) -> DynamicCache | StaticCache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=24)


def check_accuracy(name: str, result: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The accuracy rule, with eager attention as the reference in the same dtype."""
    errors = ErrorPool(name)
    errors.add(result, exact, [eager])
    if excess := errors.excess():
        raise AccuracyError(excess)
