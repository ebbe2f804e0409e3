"""Attention of the sparsity study: any visiting order, any block size, prefill or decoding, on any device.

What is dropped is decided by `fa_ops.sparsity.counting.block_margins`; the rest is a softmax over what is kept. The
kernels know one order, the study compares several. Decoding is a prefill in which every row is a query block by itself
and follows the rule of segments: teacher forcing, all steps at once.

Transformers hands a model's further keyword arguments to its attention: `model(input_ids, study=...)` takes one of the
two classes here, which see every layer's queries and keys and say what to drop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fa_ops.reference import visible
from fa_ops.sparsity.counting import block_margins
from fa_ops_meta.skip import DECODE_SEGMENT

ATTENTION = "sparsity_study"
PHASES = ("prefill", "decode")
SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}  # few enough that half of a causal window is left out

# ln λ at which a pass of `Margins` counts, ascending to λ = 1, the end of what λ can drop.
LN_GRID = torch.linspace(-16.0, 0.0, 801)


class Setting(NamedTuple):
    """What the share and the loss depend on besides λ; `br` is 1 in decoding."""

    order: str
    phase: str
    br: int
    bc: int

    def dropped(self, margins: Tensor, is_visited: Tensor, ln_threshold: Tensor) -> Tensor:
        """(B, Hq, query blocks, key blocks), of margins like that and ln λ (Hq,)."""
        return is_visited & (margins < ln_threshold[:, None, None])

    def margins(self, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of scores (B, Hq, rows, keys): margins (B, Hq, query blocks, key blocks), and which blocks are visited."""
        segment = DECODE_SEGMENT // self.bc if self.phase == "decode" else None
        margins, is_visited = block_margins(scores.flatten(0, 1), mask, (self.br, self.bc), self.order, segment)
        return margins.unflatten(0, scores.shape[:2]), is_visited

    def block_sums(self, t: Tensor) -> Tensor:
        """(B, Hq, rows, keys) as (B, Hq, query blocks, key blocks)."""
        rows, keys = t.shape[-2:]
        padding = (0, -keys % self.bc, 0, -rows % self.br)
        if any(padding):  # an empty one would copy
            t = torch.nn.functional.pad(t, padding)
        return t.unflatten(3, (-1, self.bc)).sum(-1).unflatten(2, (-1, self.br)).sum(3)


class Study(Protocol):
    def keep(self, layer: int, scores: Tensor, mask: Tensor) -> Tensor:
        """Which of the scores (B, Hq, rows, keys) take part, a mask that broadcasts to them; `mask` is the causal one,
        (rows, keys)."""


class Margins:
    """Drops nothing, and measures what each λ of the grid would drop, for many settings in one pass.

    `counts[setting]` is (2, layers, Hq, grid + 1) float64: blocks whose margin lies between two λ of the grid, and the
    attention that these get, in rows: the sum of their probabilities.
    """

    def __init__(self, settings: Sequence[Setting], num_layers: int, num_heads: int) -> None:
        shape = (2, num_layers, num_heads, len(LN_GRID) + 1)
        self.counts = {setting: torch.zeros(shape, dtype=torch.float64) for setting in settings}

    def keep(self, layer: int, scores: Tensor, mask: Tensor) -> Tensor:
        grid, probabilities = LN_GRID.to(scores.device), scores.softmax(-1)
        for setting, counts in self.counts.items():
            margins, is_visited = setting.margins(scores, mask)
            place = torch.bucketize(margins[..., is_visited], grid, right=True).transpose(0, 1).flatten(1)
            attention = setting.block_sums(probabilities)[..., is_visited].transpose(0, 1).flatten(1)
            for total, values in zip(counts, (torch.ones_like(attention), attention), strict=True):
                added = torch.zeros(total.shape[1:], device=place.device)
                total[layer] += added.scatter_add_(1, place, values).cpu()
        return mask


class Skip:
    """Drops what each head's ln λ says, (layers, Hq), and counts visited and dropped blocks of every row, (2, B)."""

    def __init__(self, setting: Setting, ln_threshold: Tensor, batch: int) -> None:
        self.setting, self.ln_threshold = setting, ln_threshold
        self.counts = torch.zeros(2, batch, dtype=torch.int64, device=ln_threshold.device)

    def keep(self, layer: int, scores: Tensor, mask: Tensor) -> Tensor:
        ln_threshold, (br, bc) = self.ln_threshold[layer], (self.setting.br, self.setting.bc)
        margins, is_visited = self.setting.margins(scores, mask)
        dropped = self.setting.dropped(margins, is_visited, ln_threshold)
        self.counts[0] += is_visited.sum() * dropped.shape[1]
        self.counts[1] += dropped.sum((1, 2, 3))
        rows, keys = mask.shape
        kept = (~dropped).repeat_interleave(br, 2)[:, :, :rows].repeat_interleave(bc, 3)[..., :keys]
        return kept & mask


def register() -> None:
    """No mask function is registered, so that Transformers makes no mask: the study's batches have no padding."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, study_attention)


def study_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    study: Study | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention as Transformers calls it: query (B, Hq, S, D), key and value (B, Hkv, S, D), in float32."""
    if study is None or attention_mask is not None or sliding_window is not None or query.shape[2] != key.shape[2]:
        raise ValueError("study: the sparsity study takes whole windows without padding, sliding windows or a cache")
    dtype, group = value.dtype, query.shape[1] // key.shape[1]
    key, value = (t.float().repeat_interleave(group, 1) for t in (key, value))
    query = query.float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    length = query.shape[2]
    step = max(128, SCORES_AT_ONCE[query.device.type] // (query.shape[:2].numel() * length) // 128 * 128)
    parts = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        mask = visible(end - begin, end, True, None, query.device)
        scores = (query[:, :, begin:end] @ key[:, :, :end].transpose(-1, -2)).masked_fill_(~mask, -torch.inf)
        kept = study.keep(module.layer_idx, scores, mask)
        parts.append(scores.masked_fill_(~kept, -torch.inf).softmax(-1) @ value[:, :, :end])
    return torch.cat(parts, 2).transpose(1, 2).to(dtype), None
