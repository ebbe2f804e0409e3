"""Cases that the forward kernel for sm_90 takes."""

import dataclasses
import itertools

import torch

from tests.support.cases import Case
from tests.support.draw import MANY_ROWS, Profile, draw_case


def draw_many(profile: Profile, count: int) -> list[Case]:
    """The first `count` Cases in which a maximum over the rows compares more than luck."""
    cases = (draw_supported(profile, seed) for seed in itertools.count())
    return list(itertools.islice((case for case in cases if max(case.lens_q, default=0) >= MANY_ROWS), count))


def draw_supported(profile: Profile, seed: int) -> Case:
    """A Case of the profile without what the kernel does not know; every fourth has a window, where it can."""
    case = dataclasses.replace(draw_case(profile, seed), key_mask=None, softcap=0.0, has_sinks=False)
    if case.memory == "gapped":
        case = dataclasses.replace(case, memory="contiguous")
    if case.softmax_scale is not None and case.softmax_scale <= 0:
        case = dataclasses.replace(case, softmax_scale=None)
    window_size = (-1, -1)
    if seed % 4 == 0 and case.head_dim <= 128:
        window_size = (seed * 7 % profile.max_len, seed % 7 * 20)
    return dataclasses.replace(case, is_causal=case.is_causal and seed % 8 != 4, window_size=window_size)


def draw_many_backward(profile: Profile, count: int) -> list[Case]:
    """As `draw_many`, of those that the backward kernels take: they know sinks, and no window_left."""
    cases = [case for case in draw_many(profile, 2 * count) if case.head_dim <= 128]
    return [
        dataclasses.replace(
            case,
            key_mask=None,
            has_sinks=n % 4 == 1 and case.dtype == torch.float16,
            window_size=(-1, n * 7 % 90 if n % 3 == 0 and not case.is_causal else -1),
        )
        for n, case in enumerate(cases[:count])
    ]
