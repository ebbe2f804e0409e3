"""The workloads: which sequences, heads and types are timed on which device, and their FLOP count."""

import math
import random
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

CPU_LENGTHS = (1024, 33, 769, 256, 512, 65, 384, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOP_FACTOR = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}
DIRECTIONS = {"cpu": ("forward", "forward_backward"), "cuda": ("forward", "backward")}

FIXED_PEERS = ("fa_ops", "sdpa_cudnn", "sdpa_flash", "torch_varlen")
VARLEN_PEERS = ("fa_ops", "torch_varlen", "sdpa_loop")


@dataclass(frozen=True)
class Case:
    """One attention workload over a batch of sequences.

    `impls` are the implementations to time in it, ours first. `twin` names the case of equal-length sequences whose
    speed this one's is to be compared with.
    """

    name: str
    dtype: str
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    lengths: tuple[int, ...]
    is_causal: bool
    impls: tuple[str, ...]
    twin: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def is_fixed_length(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    def flops(self, direction: str) -> float:
        """Floating-point operations by the usual count: two products of Lq x Lk x D forward, five backward, half of it
        when causal; what an implementation recomputes does not count."""
        products = 4 * sum(length * length for length in self.lengths) * self.head_dim * self.num_heads_q
        return products * FLOP_FACTOR[direction] * (0.5 if self.is_causal else 1.0)


def cpu_cases(quick: bool) -> list[Case]:
    impls = ("fa_ops", "sdpa_sum", "sdpa_loop", "sdpa_padded")
    cases = [
        Case(f"{len(CPU_LENGTHS)} sequences, {mask_name(is_causal)}", dtype, 8, 2, 64, CPU_LENGTHS, is_causal, impls)
        for dtype in ("float32", "bfloat16")
        for is_causal in (True, False)
    ]
    return cases[:1] if quick else cases


def goal_cases() -> dict[str, Case]:
    """What the goals of dense attention are measured on, in the order of their importance."""
    packed, packed_twin = varlen_cases(48, 128, 1024, 2048, with_flex=True)
    wide, wide_twin = varlen_cases(48, 128, 128, 4096, with_flex=False)
    return {
        "causal 8k": fixed_case("bfloat16", 48, 48, 128, 8192, True, with_flex=True, with_portable=True),
        "causal 16k": fixed_case("bfloat16", 48, 48, 128, 16384, True),
        "full 8k": fixed_case("bfloat16", 48, 48, 128, 8192, False, with_portable=True),
        "full 16k": fixed_case("bfloat16", 48, 48, 128, 16384, False),
        "D 64": fixed_case("bfloat16", 32, 32, 64, 16384, False),
        "D 256": fixed_case("bfloat16", 8, 8, 256, 16384, True),
        "packed": packed,
        "packed, twin": packed_twin,
        "wide": wide,
        "wide, twin": wide_twin,
    }


def more_cases() -> list[Case]:
    """Beside the goals: mostly 16k tokens in batches of equal lengths, the most telling first.

    FlexAttention compiles for every shape, about as long as all the rest takes, so it is in a few cases only.
    """
    lengths = {128: (4096, 8192, 2048, 1024, 16384, 512), 64: (16384, 4096, 1024), 256: (16384, 4096, 1024)}
    heads = {128: 48, 64: 32, 256: 8}
    fixed = [
        fixed_case("bfloat16", heads[dim], heads[dim], dim, lengths[dim][rank], is_causal)
        for rank in range(6)
        for is_causal in (True, False)
        for dim in heads
        if rank < len(lengths[dim])
    ]
    telling = [
        fixed_case("bfloat16", 48, 48, 128, 4096, True, with_flex=True),
        fixed_case("bfloat16", 32, 8, 128, 4096, True, with_flex=True),
        fixed_case("bfloat16", 48, 6, 128, 8192, True),
        fixed_case("float16", 48, 48, 128, 4096, True),
    ]
    known = {replace(case, impls=()) for case in (*goal_cases().values(), *telling)}
    return telling + [case for case in fixed if replace(case, impls=()) not in known]


def fixed_case(
    dtype: str, num_heads_q: int, num_heads_kv: int, head_dim: int, length: int, is_causal: bool,
    with_flex: bool = False, with_portable: bool = False,
) -> Case:  # fmt: skip
    batch = 16384 // length
    impls = FIXED_PEERS + ("flex_attention",) * with_flex + ("fa_ops_portable",) * with_portable
    name = f"{batch} x {length}, {mask_name(is_causal)}"
    return Case(name, dtype, num_heads_q, num_heads_kv, head_dim, (length,) * batch, is_causal, impls)


def varlen_cases(num_heads: int, head_dim: int, shortest: int, longest: int, with_flex: bool) -> list[Case]:
    """32k tokens in sequences of random lengths, and a batch of equal lengths with nearly the same FLOPs."""
    lengths = random_lengths(32768, shortest, longest)
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    batch = round(tokens * tokens / squares)
    length = round(math.sqrt(squares / batch) / 64) * 64
    shape = ("bfloat16", num_heads, num_heads, head_dim)
    twin = Case(f"{batch} x {length}, causal, twin", *shape, (length,) * batch, True, FIXED_PEERS)
    impls = VARLEN_PEERS + ("flex_attention",) * with_flex
    return [Case(f"random {shortest}-{longest}, causal", *shape, lengths, True, impls, twin.name), twin]


def random_lengths(tokens: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) + longest <= tokens:
        lengths.append(generator.randint(shortest, longest))
    return (*lengths, max(shortest, tokens - sum(lengths)))


def overhead_case(device: str) -> Case:
    """So small that the computation does not count."""
    dtype, head_dim, peer = ("float32", 16, "sdpa_sum") if device == "cpu" else ("bfloat16", 64, "torch_varlen")
    return Case("1 x 4, causal", dtype, 2, 2, head_dim, (4,), True, ("fa_ops", peer))


def mask_name(is_causal: bool) -> str:
    return "causal" if is_causal else "full"
