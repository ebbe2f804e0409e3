"""Decoding: one new token for each sequence of a batch, over a cache that is read in place; and what the card copies.

A decoding step does little more than read its keys and values, so its figure is their bytes over the time, beside the
rate at which the same card, in the same run, copies a large buffer (bytes read and bytes written).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import DTYPES
from comparing import TOLERANCE, compare, error_text, has_run, judged, relative_difference
from report import Row
from timing import Clock, Run, interleave, summary
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_ops
from fa_ops.reference import attention_reference

SECONDS_PER_RUN = 0.25
COPIED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class DecodeCase:
    """`batch` queries of one row, each over `length` keys. The cache is padded, (B, Hkv, S, D), or made of pages,
    (pages, page_size, Hkv, D), which belong to the sequences in a random order."""

    batch: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    length: int
    page_size: int | None = None
    dtype: str = "bfloat16"

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that a step reads."""
        tokens = self.batch * self.length
        return 2 * tokens * self.num_heads_kv * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def impls(self) -> tuple[str, ...]:
        return tuple(PADDED if self.page_size is None else PAGED)

    @property
    def columns(self) -> Row:
        pages = "" if self.page_size is None else f", pages of {self.page_size}"
        return {
            "case": f"{self.batch} x 1 over {self.length} keys{pages}",
            "dtype": self.dtype,
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
            "head_dim": self.head_dim,
            "batch": self.batch,
            "lengths": f"{self.batch} x {self.length}",
            "is_causal": True,
            "direction": "decode",
        }

    def planned(self) -> list[Row]:
        return [self.columns | {"impl": impl} for impl in self.impls]


def decode_cases() -> list[DecodeCase]:
    """The goals' workloads, longest first, then pages."""
    heads = ((64, 4), (32, 8))
    padded = [DecodeCase(64, *pair, 128, length) for length in (65536, 16384, 32768) for pair in heads]
    return padded + [DecodeCase(64, 64, 4, 128, length, size) for length in (16384, 65536) for size in (16, 256)]


@dataclass
class Cache:
    """q (B, 1, Hq, D); k and v in the layout of the case; starts and lengths (B,), table (B, pages of a sequence), all
    int32, the table None for a padded cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor | None


def make_cache(case: DecodeCase, device: str, seed: int = 0) -> Cache:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    table, shape = None, (case.batch, case.num_heads_kv, case.length, case.head_dim)
    if case.page_size is not None:
        if case.length % case.page_size:
            raise ValueError(f"page_size: {case.page_size} given for {case.length} keys; accepted are divisors of them")
        pages = case.batch * case.length // case.page_size
        table = torch.randperm(pages, generator=generator, device=device).int().unflatten(0, (case.batch, -1))
        shape = (pages, case.page_size, case.num_heads_kv, case.head_dim)
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device=device)
    q = draw(case.batch, 1, case.num_heads_q, case.head_dim)
    return Cache(q, draw(*shape), draw(*shape), torch.zeros_like(lengths), lengths, table)


def decode_run(step: Callable[[], Tensor], case: DecodeCase) -> Run:
    """A run of `step() -> out`, of any shape with (B, Hq, D) behind it; there are no gradients."""
    shape = (case.batch, case.num_heads_q, case.head_dim)
    return Run((), lambda: (step(),), (), lambda outputs: outputs[0].reshape(shape), lambda gradient: gradient)


def ours(case: DecodeCase, cache: Cache) -> Run:
    one = torch.ones_like(cache.lengths)
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)

    def step() -> Tensor:
        return fa_ops.attention(
            cache.q, k, v, cache.starts, one, b_start_loc_k=cache.starts, b_seq_len_k=cache.lengths
        )  # fmt: skip

    return decode_run(step, case)


def sdpa_grouped(case: DecodeCase, cache: Cache, backend: SDPBackend) -> Run:
    """One SDPA call through one backend. The query heads of a key head go in as its rows: they see the same keys, and
    nothing is read twice."""
    grouped = cache.q.view(case.batch, case.num_heads_kv, -1, case.head_dim)

    def step() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(grouped, cache.k, cache.v)

    return decode_run(step, case)


def sdpa_cudnn(case: DecodeCase, cache: Cache) -> Run:
    return sdpa_grouped(case, cache, SDPBackend.CUDNN_ATTENTION)


def sdpa_flash(case: DecodeCase, cache: Cache) -> Run:
    return sdpa_grouped(case, cache, SDPBackend.FLASH_ATTENTION)


def paged_run(attention: Callable[..., Tensor], case: DecodeCase, cache: Cache) -> Run:
    """A function with the signature of torch 2.13's varlen_attn."""
    q, cu_seq_q = cache.q[:, 0], torch.arange(case.batch + 1, dtype=torch.int32, device=cache.q.device)
    options = {"enable_gqa": True, "seqused_k": cache.lengths, "block_table": cache.table}
    return decode_run(lambda: attention(q, cache.k, cache.v, cu_seq_q, None, 1, case.length, **options), case)


def ours_paged(case: DecodeCase, cache: Cache) -> Run:
    return paged_run(fa_ops.varlen_attn, case, cache)


def torch_varlen_paged(case: DecodeCase, cache: Cache) -> Run:
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no block_table")
    return paged_run(varlen_attn, case, cache)


Prepare = Callable[[DecodeCase, Cache], Run]
PADDED: dict[str, Prepare] = {"fa_ops": ours, "sdpa_cudnn": sdpa_cudnn, "sdpa_flash": sdpa_flash}
PAGED: dict[str, Prepare] = {"fa_ops": ours_paged, "torch_varlen": torch_varlen_paged}


@torch.no_grad()
def bench_decode(case: DecodeCase, device: str, clock: Clock, rounds: int) -> list[Row]:
    """A row for each implementation, those that raise included. Ours is compared with attention in float64, in the
    last sequence; the others are compared with ours."""
    cache = make_cache(case, device)
    rows = {row["impl"]: row for row in case.planned()}
    runs: dict[str, Run] = {}
    for impl, prepare in (PADDED if case.page_size is None else PAGED).items():
        try:
            runs[impl] = prepare(case, cache)
        except Exception as error:
            rows[impl]["error"] = error_text(error)
    for impl, finding in compare(runs, "forward", TOLERANCE[case.dtype]).items():
        rows[impl] |= finding
        if not has_run(finding):
            del runs[impl]
    if "fa_ops" in runs:
        last = runs["fa_ops"].pack_outputs(runs["fa_ops"].forward())[-1]
        difference = relative_difference(last, reference_of_last(cache))
        rows["fa_ops"] |= judged(difference, "attention in float64", TOLERANCE[case.dtype])
    samples = interleave(runs, "forward", clock, rounds, SECONDS_PER_RUN * len(runs)) if runs else {}
    for impl, milliseconds in samples.items():
        figures = summary(milliseconds)
        rows[impl] |= figures | {"gb_per_s": case.cache_bytes / figures["median_ms"] / 1e6}
    return list(rows.values())


def reference_of_last(cache: Cache) -> Tensor:
    """Attention of the last sequence in float64, (Hq, D)."""
    if cache.table is None:
        k, v = (x[-1].transpose(0, 1) for x in (cache.k, cache.v))
    else:
        k, v = (x[cache.table[-1]].flatten(0, 1) for x in (cache.k, cache.v))
    one = torch.ones_like(cache.starts[-1:])
    return attention_reference(
        cache.q[-1].double(), k.double(), v.double(), cache.starts[-1:], one,
        b_start_loc_k=cache.starts[-1:], b_seq_len_k=cache.lengths[-1:],
    )[0]  # fmt: skip


def planned_copy(size: int) -> Row:
    blank = dict.fromkeys(("dtype", "num_heads_q", "num_heads_kv", "head_dim", "batch", "lengths", "is_causal"), "")
    return {"case": f"copy of {size / 2**30:g} GiB", **blank, "direction": "copy", "impl": "torch_copy"}


def bench_copy(device: str, clock: Clock, rounds: int, size: int) -> list[Row]:
    """The rate of `copy_` of so many bytes, read and written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = Run((), lambda: (target.copy_(source),), (), lambda outputs: outputs[0], lambda gradient: gradient)
    figures = summary(interleave({"": run}, "forward", clock, rounds, SECONDS_PER_RUN)[""])
    if not torch.equal(source, target):
        raise RuntimeError("copy_ has not copied")
    return [planned_copy(size) | figures | {"gb_per_s": 2 * size / figures["median_ms"] / 1e6}]
