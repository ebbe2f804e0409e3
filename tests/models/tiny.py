"""Tiny random models, batches and the calls that the tests of this folder compare."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

from fa_ops.integrations.huggingface import ATTENTION_NAME, register_triton_attention
from tests.support.accuracy import AccuracyError, ErrorPool

register_triton_attention()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 97
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
PADDINGS = ("none", "left", "right")
# With right padding no row is full: the batch was padded to a fixed length.
LENGTHS = {"none": (11, 11, 11), "left": (11, 6, 1), "right": (10, 6, 1)}


def tiny_model(family: str, attention: str = ATTENTION_NAME, **changes) -> PreTrainedModel:
    """A model in eval mode. The weights depend on the shapes alone, so that `attention` may be compared."""
    config_class, model_class, own = FAMILIES[family]
    config = config_class(
        **{
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
            "attn_implementation": attention,
            **own,
            **changes,
        }
    )
    torch.manual_seed(0)
    return model_class(config).to(DEVICE).eval()


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


def exact_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Transformers' eager attention computes its softmax in float32, and in float64 gives NaN for left padding."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~attention_mask, -torch.inf)
    sees = attention_mask.any(-1, keepdim=True)
    weights = scores.where(sees, 0.0).softmax(-1).where(sees, 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), None


def exact_mask(**kwargs):
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", exact_mask)


def cache_of(kind: str, model: PreTrainedModel) -> DynamicCache | StaticCache:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)


def check_accuracy(name: str, result: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The accuracy rule, with eager attention as the reference in the same dtype."""
    errors = ErrorPool(name)
    errors.add(result, exact, [eager])
    if excess := errors.excess():
        raise AccuracyError(excess)
