"""Draws Cases: the same seed is the same Case on every machine."""

import dataclasses
import itertools
import random
from dataclasses import dataclass

import torch

from fa_ops.reference import attention_reference
from tests.support.cases import Case, Inputs
from tests.support.skip import FORMS

GROUP_SIZES = (1, 2, 3, 4, 8)
PRIMES = (2, 3, 5, 7, 11, 13, 19, 23, 29, 37, 43, 53, 61, 71, 79, 83, 97, 211, 509, 1021, 1999)
AROUND_TILES = tuple(tile + step for tile in (16, 32, 64, 128, 256) for step in (-1, 0, 1))
SKIP_STRIDE = 100_003  # between the seeds of two attempts at one case
PADDED, PACKED = ("left", "right", "both"), ("tight", "gaps", "shuffled")
# A maximum over a handful of numbers compares little but luck: a batch has many rows, or else many heads.
MANY_ROWS, MANY_HEADS = 16, 12


@dataclass(frozen=True)
class Profile:
    """What a device can be asked for."""

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[tuple[int, int], ...]  # of keys, of values
    max_len: int
    max_rows_by_heads: int  # query rows, padding included, times query heads: what a case may cost
    max_seqs: int = 4
    feature_rate: float = 0.2  # how often each of window, softcap and sinks is in use


def draw_case(profile: Profile, seed: int) -> Case:
    rng = random.Random(seed)
    group_size = rng.choice(GROUP_SIZES)
    heads_kv = rng.choice((1, 2)) if group_size < 4 else 1
    lens_q, lens_k = _draw_lengths(rng, profile, heads_kv * group_size)
    has_many_rows = max((min(pair) for pair in zip(lens_q, lens_k or lens_q, strict=True)), default=0) >= MANY_ROWS
    if not has_many_rows:
        heads_kv = -(-MANY_HEADS // group_size)
    head_dim, value_dim = rng.choice(profile.head_dims)
    is_padded = rng.random() < 0.5
    memory = ("contiguous", "head_major", "gapped") + ("fused_qkv",) * 2 * (lens_k is None)
    return Case(
        seed=seed,
        dtype=rng.choice(profile.dtypes),
        is_padded=is_padded,
        placement=rng.choice(PADDED if is_padded else PACKED),
        lens_q=lens_q,
        lens_k=lens_k,
        heads_kv=heads_kv,
        group_size=group_size,
        head_dim=head_dim,
        value_dim=value_dim,
        is_causal=rng.random() < 0.6,
        # at scale 0 the lse of a single key is 0, which leaves the rule nothing to allow for
        softmax_scale=rng.choice((None, None, None, None, 1.0, 0.3, -0.2, 0.0 if has_many_rows else None)),
        key_mask=rng.choice((None, None, "random", "hole", "all")) if is_padded else None,
        memory=rng.choice(memory),
        dout=rng.choice(("dense", "dense", "expanded", "transposed")),
        has_dlse=rng.random() < 0.5,
        index_dtype=rng.choice((torch.int32, torch.int64)),
        max_input_len=rng.choice(("none", "exact", "too_small")),
        window_size=_draw_window(rng, profile.max_len) if rng.random() < profile.feature_rate else (-1, -1),
        softcap=rng.choice((1.5, 30.0)) if rng.random() < profile.feature_rate else 0.0,
        has_sinks=rng.random() < profile.feature_rate,
    )


def draw_skip_case(profile: Profile, seed: int, blocks: tuple[tuple[int, int], ...]) -> Case:
    """A case of skip-softmax, drawn again until 10 to 90 % of its blocks are dropped; it builds what it draws."""
    attempts = (_draw_skip_case(profile, attempt, blocks) for attempt in itertools.count(seed, SKIP_STRIDE))
    return next(case for case in attempts if 0.1 <= dropped_share(case.build()) <= 0.9)


def dropped_share(inputs: Inputs) -> float:
    """Dropped blocks by visited ones, in the oracle."""
    *_, counts = inputs.call(attention_reference, inputs.q, inputs.k, inputs.v, return_skip_counts=True)
    visited, dropped = counts.sum((1, 2)).tolist()
    return dropped / max(visited, 1)


def _draw_skip_case(profile: Profile, seed: int, blocks: tuple[tuple[int, int], ...]) -> Case:
    """Sequences of several of the `blocks`: prefill, its chunks, or decoding."""
    case, rng = draw_case(profile, seed), random.Random(seed)
    br, bc = rng.choice(blocks)
    lens_k = [rng.randint(min(4 * bc, profile.max_len), profile.max_len) for _ in range(rng.randint(1, 3))]
    relation = rng.choice(("shared", "shared", "shorter", "longer", "decode"))
    extra = {"shorter": -rng.randint(1, 2 * br), "longer": rng.randint(1, br)}.get(relation, 0)
    lens_q = [1 if relation == "decode" else max(2, n + extra) for n in lens_k]
    if rng.random() < 0.2:
        lens_q.append(rng.choice((0, 5)))
        lens_k.append(0 if relation == "shared" else 5)
    return dataclasses.replace(
        case,
        lens_q=tuple(lens_k if relation == "shared" else lens_q),
        lens_k=None if relation == "shared" else tuple(lens_k),
        memory="contiguous" if relation != "shared" and case.memory == "fused_qkv" else case.memory,
        key_mask=None if case.key_mask == "all" else case.key_mask,
        window_size=rng.choice(((2 * bc, -1), (3 * bc, bc), (-1, 7))) if rng.random() < 0.2 else (-1, -1),
        softmax_scale=case.softmax_scale or None,
        softcap=30.0 if case.softcap else 0.0,
        skip_share=rng.choice((0.25, 0.5, 0.7, 0.85)),
        skip_block=(br, bc),
        skip_form=rng.choice(FORMS),
    )


def draw_like(profile: Profile, like: Case, seed: int) -> Case:
    """A case of other sequences that needs no other kernel than `like`."""
    case = draw_case(profile, seed)
    placements = PADDED if like.is_padded else PACKED
    return dataclasses.replace(
        like,
        seed=seed,
        placement=random.Random(seed).choice(placements),
        lens_q=case.lens_q,
        lens_k=None if like.memory == "fused_qkv" else case.lens_k,
        softmax_scale=case.softmax_scale,
        max_input_len=case.max_input_len,
    )


def _draw_lengths(rng: random.Random, profile: Profile, heads: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Lengths of queries and of keys; None for keys that share the queries' metadata."""
    batch = rng.choices(("usual", "tiny", "all_empty", "none"), (88, 6, 3, 3))[0]
    if batch == "none":
        return (), rng.choice((None, ()))
    if batch == "all_empty":
        empty = (0,) * rng.randint(1, 3)
        return empty, rng.choice((None, empty))
    longest = profile.max_len if batch == "usual" else 3
    lens_q = [_draw_length(rng, longest) for _ in range(rng.randint(1, profile.max_seqs))]
    relation = rng.choice(("shared", "shared", "equal", "longer", "shorter", "decode", "any"))
    lens_k = [_relate(rng, relation, n, profile.max_len) for n in lens_q]
    if relation == "decode":
        lens_q = [1] * len(lens_q)
    for lens in (lens_q,) if relation == "shared" else (lens_q, lens_k):
        if len(lens) > 1 and rng.random() < 0.35:
            lens[rng.randrange(len(lens))] = 0
    if batch == "usual" and (relation != "decode" or rng.random() < 0.5):
        _anchor(rng, lens_q, lens_k)
    while len(lens_q) > 1 and heads * len(lens_q) * max(lens_q) > profile.max_rows_by_heads:
        longest_of_all = lens_q.index(max(lens_q))
        del lens_q[longest_of_all], lens_k[longest_of_all]
    return tuple(lens_q), None if relation == "shared" else tuple(lens_k)


def _draw_length(rng: random.Random, max_len: int) -> int:
    usual = [n for n in (*PRIMES, *AROUND_TILES) if n <= max_len]
    return rng.choices((rng.choice(usual), rng.randint(2, max_len), 1, 0), (70, 20, 5, 5))[0]


def _relate(rng: random.Random, relation: str, length: int, max_len: int) -> int:
    if relation == "longer":
        return rng.randint(length, max_len)
    if relation == "shorter":
        return rng.randint(0, length)
    if relation in ("any", "decode"):
        return _draw_length(rng, max_len)
    return length


def _draw_window(rng: random.Random, max_len: int) -> tuple[int, int]:
    return rng.choice(((-1, 0), (0, 0), (rng.randint(1, 20), -1), (-1, 3), (16, 16), (rng.randint(0, max_len), 5)))


def _anchor(rng: random.Random, lens_q: list[int], lens_k: list[int]) -> None:
    """One sequence of the batch gets many rows, and keys for most of them."""
    seq = rng.randrange(len(lens_q))
    lens_q[seq] = max(lens_q[seq], rng.randint(MANY_ROWS, 2 * MANY_ROWS))
    lens_k[seq] = max(lens_k[seq], MANY_ROWS, lens_q[seq] * 3 // 4)
