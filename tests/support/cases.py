"""Seeded attention problems of every shape, layout and memory format the op accepts.

A Case says everything in a few words and costs nothing; `Case.build` makes its tensors: each amid canaries, and NaN in
every row whose value must not matter.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fa_ops.reference import skip_softmax_blocks, visible
from tests.support import skip
from tests.support.memory import Canaries, contiguous_strides

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
DRAW_STRIDE = 1_000_003  # between the seeds of two draws of a case: more than there are cases
LOUD = 50.0  # value of masked keys: finite, as a cache's stale entries are, and unmistakable in any result


@dataclass(frozen=True)
class Case:
    """One call, forward and backward."""

    seed: int
    dtype: torch.dtype
    is_padded: bool
    placement: str  # padded: "left", "right", "both" pads; packed: "tight", "gaps", "shuffled" sequences
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...] | None  # None: no key-side metadata, keys lie where the queries do
    heads_kv: int
    group_size: int
    head_dim: int
    value_dim: int
    is_causal: bool
    softmax_scale: float | None
    key_mask: str | None  # "random", "hole", "all" keys of the first sequence left out
    memory: str  # of q, k, v: "contiguous", "head_major", "fused_qkv", "gapped"
    dout: str  # "dense", "expanded" from one element, "transposed"
    has_dlse: bool
    index_dtype: torch.dtype
    max_input_len: str  # "none", "exact", "too_small"
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    has_sinks: bool = False
    skip_share: float | None = None  # of the visited blocks, to be dropped by skip-softmax as far as a threshold can
    skip_block: tuple[int, int] = (64, 128)
    skip_form: str = "number"  # one of skip.FORMS

    def __str__(self) -> str:
        lens_k = "" if self.lens_k is None else f"-k{_dotted(self.lens_k)}"
        flags = ["causal" if self.is_causal else "full", self.memory, f"dout_{self.dout}"]
        flags += ["dlse"] * self.has_dlse + [f"mask_{self.key_mask}"] * (self.key_mask is not None)
        flags += [f"scale{self.softmax_scale}"] * (self.softmax_scale is not None)
        flags += [f"window{_dotted(self.window_size)}"] * (self.window_size != (-1, -1))
        flags += [f"softcap{self.softcap}"] * (self.softcap > 0) + ["sinks"] * self.has_sinks
        flags += [f"skip{self.skip_share}_{_dotted(self.skip_block)}_{self.skip_form}"] * (self.skip_share is not None)
        return (
            f"{self.seed}-{DTYPE_NAMES[self.dtype]}-{'padded' if self.is_padded else 'packed'}_{self.placement}"
            f"-q{_dotted(self.lens_q)}{lens_k}-h{self.heads_kv * self.group_size}:{self.heads_kv}"
            f"-d{self.head_dim}:{self.value_dim}-{'-'.join(flags)}"
        )

    def build(self, device: str = "cpu", draw: int = 0) -> "Inputs":
        """The tensors, with other values for each `draw`."""
        return _Builder(self, device, draw).inputs()


@dataclass
class Inputs:
    """The tensors of a Case. Packed rows are (total,), padded ones (B, S)."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    b_start_loc: Tensor
    b_seq_len: Tensor
    b_start_loc_k: Tensor | None
    b_seq_len_k: Tensor | None
    max_input_len: int | None
    max_input_len_k: int | None
    key_mask: Tensor | None
    sinks: Tensor | None
    skip_softmax_threshold: float | Tensor | None
    dout: Tensor
    dlse: Tensor | None
    is_query: Tensor  # (rows of q) bool: rows of a sequence
    sees: Tensor  # (rows of q) bool: queries that see a key
    is_seen: Tensor  # (rows of k) bool: keys that a query sees
    canaries: Canaries = field(default_factory=Canaries)

    def call(self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
        """out and lse of other q, k and v; `options` add to the case's keyword arguments, or replace them."""
        case = self.case
        features = {"window_size": case.window_size, "softcap": case.softcap, "sinks": self.sinks}
        if self.skip_softmax_threshold is not None:
            features["skip_softmax_threshold"] = self.skip_softmax_threshold
            features["skip_softmax_block"] = case.skip_block
        return attention(
            q, k, v, self.b_start_loc, self.b_seq_len, self.max_input_len, case.is_causal, case.softmax_scale,
            self.b_start_loc_k, self.b_seq_len_k, self.max_input_len_k,
            key_mask=self.key_mask, return_lse=True, **(features | options),
        )  # fmt: skip


class _Builder:
    """Values come from the CPU generator, so that a seed means the same numbers on every device."""

    def __init__(self, case: Case, device: str, draw: int):
        self.case = case
        self.device = device
        self.generator = torch.Generator().manual_seed(case.seed + draw * DRAW_STRIDE)
        self.rng = random.Random(case.seed)
        self.canaries = Canaries()

    def inputs(self) -> Inputs:
        case = self.case
        lens_k = case.lens_q if case.lens_k is None else case.lens_k
        starts_q, rows_q = self._place_sequences(case.lens_q)
        starts_k, rows_k = (starts_q, rows_q) if case.lens_k is None else self._place_sequences(lens_k)
        in_q = _ranges(rows_q, starts_q, case.lens_q)
        in_k = _ranges(rows_k, starts_k, lens_k)
        key_mask = self._key_mask(rows_k, in_k)
        sees, is_seen = _visibility(case, rows_q, rows_k, in_q, in_k, key_mask)

        heads_q = case.heads_kv * case.group_size
        is_in_q, is_in_k = _union(rows_q, in_q), _union(rows_k, in_k)
        q = self._normal((*rows_q, heads_q, case.head_dim), is_in_q)
        if case.softmax_scale:
            q *= case.head_dim**-0.5 / abs(case.softmax_scale)  # scores of variance 1, whatever the scale
        k = self._normal((*rows_k, case.heads_kv, case.head_dim), is_in_k)
        v = self._normal((*rows_k, case.heads_kv, case.value_dim), is_in_k)
        if case.skip_share is not None:
            skip.add_levels(q, k, case.softmax_scale or case.head_dim**-0.5, case.skip_block[1], self.generator)
        if key_mask is not None:
            for t in (k, v):
                t[is_in_k & ~key_mask] = LOUD
        threshold = self._threshold(q, k, starts_q, starts_k, lens_k, key_mask)
        q, k, v = self._lay_out(q, k, v)
        sinks = torch.randn(heads_q, generator=self.generator).to(case.dtype) if case.has_sinks else None
        # a sink is seen by every query, and passes on whatever gradient of lse arrives there
        dout, dlse = self._gradients((*rows_q, heads_q), is_in_q if case.has_sinks else sees)
        key_side = {"b_start_loc_k": starts_k, "b_seq_len_k": lens_k} if case.lens_k is not None else {}
        return Inputs(
            case=case,
            q=q,
            k=k,
            v=v,
            b_start_loc=self._index("b_start_loc", starts_q),
            b_seq_len=self._index("b_seq_len", case.lens_q),
            b_start_loc_k=self._index("b_start_loc_k", key_side.get("b_start_loc_k")),
            b_seq_len_k=self._index("b_seq_len_k", key_side.get("b_seq_len_k")),
            max_input_len=self._max_len(case.lens_q),
            max_input_len_k=self._max_len(lens_k) if key_side else None,
            key_mask=None if key_mask is None else self._place("key_mask", key_mask),
            sinks=None if sinks is None else self._place("sinks", sinks),
            skip_softmax_threshold=threshold,
            dout=dout,
            dlse=dlse,
            is_query=is_in_q.to(self.device),
            sees=sees.to(self.device),
            is_seen=is_seen.to(self.device),
            canaries=self.canaries,
        )

    def _place(self, name: str, values: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
        return self.canaries.place(values.to(self.device), strides, name)

    def _index(self, name: str, values: tuple[int, ...] | list[int] | None) -> Tensor | None:
        return None if values is None else self._place(name, torch.tensor(values, dtype=self.case.index_dtype))

    def _max_len(self, lens: tuple[int, ...]) -> int | None:
        longest = max(lens, default=0)
        return {"none": None, "exact": longest, "too_small": longest // 2}[self.case.max_input_len]

    def _normal(self, shape: tuple[int, ...], is_in: Tensor) -> Tensor:
        """Normal values in the rows where `is_in`, NaN in the others."""
        values = torch.randn(shape, generator=self.generator).to(self.case.dtype)
        values[~is_in] = torch.nan
        return values

    def _place_sequences(self, lens: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        """Start of each sequence, and the shape of the rows: (total,) or (B, S)."""
        placement, rng = self.case.placement, self.rng
        if self.case.is_padded:
            rows = max(lens, default=0) + rng.choice((0, 1, 5))
            start = {"left": lambda n: rows - n, "right": lambda n: 0, "both": lambda n: rng.randint(0, rows - n)}
            return [start[placement](n) for n in lens], (len(lens), rows)
        order = list(range(len(lens)))
        if placement == "shuffled":
            rng.shuffle(order)
        starts, end = [0] * len(lens), 0
        for seq in order:
            end += 0 if placement == "tight" else rng.choice((0, 1, 3))
            starts[seq] = end
            end += lens[seq]
        return starts, (end + (0 if placement == "tight" else rng.choice((1, 4))),)

    def _key_mask(self, rows: tuple[int, ...], ranges: list) -> Tensor | None:
        """(B, Sk) bool; outside of the ranges its value must not matter, so it is True there."""
        if self.case.key_mask is None:
            return None
        key_mask = torch.ones(rows, dtype=torch.bool)
        for seq, (batch, own) in enumerate(ranges):
            n = own.stop - own.start
            if self.case.key_mask == "random":
                key_mask[batch, own] = torch.rand(n, generator=self.generator) < 0.6
            elif self.case.key_mask == "hole":
                key_mask[batch, own.start + n // 3 : own.start + 2 * n // 3] = False
            else:
                key_mask[batch, own] = seq > 0
        return key_mask

    def _threshold(self, q, k, starts_q, starts_k, lens_k, key_mask) -> float | Tensor | None:
        case = self.case
        if case.skip_share is None:
            return None
        ranges_q, ranges_k = ((torch.tensor(t) for t in pair) for pair in ((starts_q, case.lens_q), (starts_k, lens_k)))
        skips = skip_softmax_blocks(
            q, k, *ranges_q, case.is_causal, case.softmax_scale, *ranges_k,
            window_size=case.window_size, softcap=case.softcap, key_mask=key_mask, skip_softmax_block=case.skip_block,
        )  # fmt: skip
        threshold = skip.thresholds(skips, case.skip_share, case.skip_form)
        return self._place("threshold", threshold) if isinstance(threshold, Tensor) else threshold

    def _lay_out(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.case.memory == "fused_qkv":
            sizes = [t.shape[-2] * t.shape[-1] for t in (q, k, v)]
            fused = self._place("qkv", torch.cat([t.flatten(-2) for t in (q, k, v)], -1))
            parts = zip(fused.split(sizes, -1), (q, k, v), strict=True)
            return tuple(part.unflatten(-1, t.shape[-2:]) for part, t in parts)
        strides = {"contiguous": contiguous_strides, "head_major": _head_major_strides, "gapped": _gapped_strides}
        named = (("q", q), ("k", k), ("v", v))
        return tuple(self._place(name, t, strides[self.case.memory](t.shape)) for name, t in named)

    def _gradients(self, rows_and_heads: tuple[int, ...], matters: Tensor) -> tuple[Tensor, Tensor | None]:
        """dout and dlse; NaN in the rows that it must not matter in, unless one element is all there is."""
        case = self.case
        *rows, heads = rows_and_heads
        shape = (*rows_and_heads, case.value_dim)
        lse_shape = (*rows[:-1], heads, rows[-1])
        if case.dout == "expanded":
            one = self._place("dout", torch.ones(1, dtype=case.dtype))
            return one.expand(shape), self._place("dlse", torch.ones(1)).expand(lse_shape) if case.has_dlse else None
        dout = self._normal(shape, matters)
        strides = contiguous_strides(shape)
        if case.dout == "transposed":
            strides = contiguous_strides(shape[::-1])[::-1]
        dlse = torch.randn(rows_and_heads, generator=self.generator)
        dlse[~matters] = torch.nan
        dlse = self._place("dlse", dlse.transpose(-1, -2).contiguous()) if case.has_dlse else None
        return self._place("dout", dout, strides), dlse


def _dotted(lens: tuple[int, ...]) -> str:
    return ".".join(map(str, lens)) or "none"


def _head_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A key-value cache, (B, H, capacity, D) in memory with room for 3 rows more, seen as (B, S, H, D)."""
    *batch, rows, heads, dim = shape
    order = contiguous_strides((*batch, heads, rows + 3, dim))
    return (*order[:-3], order[-2], order[-3], 1)


def _gapped_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    *rows, heads, dim = shape
    return contiguous_strides((*rows, heads + 1, dim + 3))


def _ranges(rows: tuple[int, ...], starts: list[int], lens: tuple[int, ...]) -> list[tuple]:
    """Of each sequence the index of its rows: (sequence, slice) padded, (Ellipsis, slice) packed."""
    return [
        (seq if len(rows) == 2 else ..., slice(start, start + n))
        for seq, (start, n) in enumerate(zip(starts, lens, strict=True))
    ]


def _union(rows: tuple[int, ...], ranges: list[tuple]) -> Tensor:
    is_in = torch.zeros(rows, dtype=torch.bool)
    for index in ranges:
        is_in[index] = True
    return is_in


def _visibility(case, rows_q, rows_k, in_q, in_k, key_mask) -> tuple[Tensor, Tensor]:
    sees, is_seen = torch.zeros(rows_q, dtype=torch.bool), torch.zeros(rows_k, dtype=torch.bool)
    for index_q, index_k in zip(in_q, in_k, strict=True):
        own_mask = None if key_mask is None else key_mask[index_k]
        len_q, len_k = len(sees[index_q]), len(is_seen[index_k])
        mask = visible(len_q, len_k, case.is_causal, own_mask, sees.device, case.window_size)
        sees[index_q] = mask.any(1)
        is_seen[index_k] = mask.any(0)
    return sees, is_seen
