"""Cases that the forward kernel for sm_90 takes."""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fa_ops import hopper
from fa_ops.launching import IS_INTERPRETED
from tests.support.cases import Case
from tests.support.draw import MANY_ROWS, SKIP_STRIDE, Profile, draw_case, draw_skip_case, dropped_share


def draw_many(profile: Profile, count: int) -> list[Case]:
    """The first `count` Cases in which a maximum over the rows compares more than luck."""
    cases = (draw_supported(profile, seed) for seed in itertools.count())
    return list(itertools.islice((case for case in cases if max(case.lens_q, default=0) >= MANY_ROWS), count))


def draw_launches(seed: int, rows: int, count: int) -> Iterator[tuple[list[int], list[int], bool, Tensor]]:
    """(starts, lengths, is_causal, starts and lengths on the GPU) of `count` ways to cut up to `rows` rows into
    sequences. All are copied there at once: nobody waits between two launches."""
    rng = random.Random(seed)
    cuts = [sorted(rng.sample(range(rows + 1), rng.randint(2, 12))) for _ in range(count)]
    all_cuts = torch.tensor(list(itertools.chain(*cuts)), dtype=torch.int32).cuda()
    for own, on_gpu in zip(cuts, all_cuts.split([len(c) for c in cuts]), strict=True):
        lens = [end - start for start, end in itertools.pairwise(own)]
        yield own[:-1], lens, rng.random() < 0.5, torch.stack([on_gpu[:-1], on_gpu.diff()])


def count_launches(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list:
    """Holds an entry for each call of a kernel's `attend` from now on."""
    taken: list[None] = []
    attend = module.attend

    def counted(*args):
        taken.append(None)
        return attend(*args)

    monkeypatch.setattr(module, "attend", counted)
    return taken


def draw_supported(profile: Profile, seed: int) -> Case:
    """A Case of the profile without what the kernel does not know; every fourth has a window, where it can."""
    case = _supported(draw_case(profile, seed))
    if case.key_mask is not None and IS_INTERPRETED:
        # the portable kernel's, too, and numpy's sums of 256 products in float32 are half as exact as torch's
        head_dim = min(case.head_dim, 128)
        case = dataclasses.replace(case, head_dim=head_dim, value_dim=head_dim)
    window_size = (-1, -1)
    if seed % 4 == 0 and case.head_dim <= 128:
        window_size = (seed * 7 % profile.max_len, seed % 7 * 20)
    return dataclasses.replace(case, is_causal=case.is_causal and seed % 8 != 4, window_size=window_size)


def draw_sparse(profile: Profile, seed: int) -> Case:
    """A Case of skip-softmax without what the kernel does not know; the profile has one head dimension."""
    ((head_dim, _),) = profile.head_dims
    attempts = (_draw_sparse(profile, attempt, head_dim) for attempt in itertools.count(seed, SKIP_STRIDE))
    affordable = (
        case for case in attempts if case.heads_kv * case.group_size * sum(case.lens_q) <= profile.max_rows_by_heads
    )
    return next(case for case in affordable if 0.1 <= dropped_share(case.build()) <= 0.9)


def _draw_sparse(profile: Profile, seed: int, head_dim: int) -> Case:
    case = _supported(draw_skip_case(profile, seed, hopper.SKIP_BLOCKS[head_dim]))
    case = dataclasses.replace(case, window_size=(-1, case.window_size[1]))
    if case.is_padded and max(case.lens_q) == 1:
        case = dataclasses.replace(case, is_padded=False, placement="gaps", key_mask=None)
    return case


def _supported(case: Case) -> Case:
    case = dataclasses.replace(case, softcap=0.0, has_sinks=False)
    if case.key_mask is not None and IS_INTERPRETED:
        # sequences with holes are the portable kernel's, and Triton's interpreter knows no bfloat16
        case = dataclasses.replace(case, dtype=torch.float16)
    if case.memory == "gapped":
        case = dataclasses.replace(case, memory="contiguous")
    if case.softmax_scale is not None and case.softmax_scale <= 0:
        case = dataclasses.replace(case, softmax_scale=None)
    return case


def draw_many_backward(profile: Profile, count: int) -> list[Case]:
    """As `draw_many`, of those that the backward kernels take: they know sinks, and no window_left."""
    cases = [case for case in draw_many(profile, 2 * count) if case.head_dim <= 128]
    return [
        dataclasses.replace(
            case,
            has_sinks=n % 4 == 1 and case.dtype == torch.float16,
            window_size=(-1, n * 7 % 90 if n % 3 == 0 and not case.is_causal else -1),
        )
        for n, case in enumerate(cases[:count])
    ]
