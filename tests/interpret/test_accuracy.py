"""The kernels under the accuracy rule, forward and backward, amid canaries and poisoned allocations."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch

import fa_ops
from tests.support.accuracy import check_case
from tests.support.cases import Case
from tests.support.draw import GROUP_SIZES, Profile, draw_case

# bfloat16 is silently wrong in the interpreter
PROFILE = Profile(
    dtypes=(torch.float32, torch.float16),
    head_dims=((16, 16), (24, 24), (32, 32), (40, 40), (64, 64), (32, 64), (64, 32), (33, 17), (80, 48)),
    max_len=100,
    max_rows_by_heads=350,
    max_seqs=3,
)
CASES = [draw_case(PROFILE, seed) for seed in range(304)]
# Windows, softcap and sinks, most often more than one of them.
FEATURE_PROFILE = dataclasses.replace(PROFILE, max_len=64, max_rows_by_heads=200, feature_rate=0.6)


def features(case: Case) -> tuple[bool, bool, bool]:
    """Whether a window, a softcap and sinks are in use."""
    return case.window_size != (-1, -1), case.softcap > 0, case.has_sinks


FEATURE_CASES = [
    case for case in (draw_case(FEATURE_PROFILE, seed) for seed in range(2000, 2220)) if any(features(case))
]


def drawn() -> list:
    """All cases; `make test` has every eighth one."""
    return [
        pytest.param(case, marks=pytest.mark.slow if index % 8 else (), id=str(case))
        for index, case in enumerate([*CASES, *FEATURE_CASES])
    ]


@pytest.mark.parametrize("case", drawn())
def test_accuracy(case: Case):
    check_case(fa_ops.attention, case)


def test_there_are_enough_cases():
    assert len({str(case) for case in CASES}) >= 300
    assert {case.group_size for case in CASES} == set(GROUP_SIZES)


def _lens(case: Case) -> list[tuple[int, int]]:
    return list(zip(case.lens_q, case.lens_k or case.lens_q, strict=True))


def _is_laid_out(case: Case, memory: str, is_padded: bool) -> bool:
    return case.memory == memory and case.is_padded == is_padded


@pytest.mark.parametrize(
    ("what", "is_covered"),
    [
        ("no sequence", lambda case: not case.lens_q),
        ("all sequences empty", lambda case: case.lens_q and not any(case.lens_q)),
        ("an empty sequence first", lambda case: sum(case.lens_q[1:]) and case.lens_q[0] == 0),
        ("an empty sequence in the middle", lambda case: 0 in case.lens_q[1:-1]),
        ("an empty sequence last", lambda case: sum(case.lens_q[:-1]) and case.lens_q[-1] == 0),
        ("queries without keys", lambda case: any(n and not m for n, m in _lens(case))),
        ("keys without queries", lambda case: any(m and not n for n, m in _lens(case))),
        ("causal with more queries than keys", lambda case: case.is_causal and any(n > m > 0 for n, m in _lens(case))),
        ("causal with more keys than queries", lambda case: case.is_causal and any(m > n > 0 for n, m in _lens(case))),
        ("one query, many keys", lambda case: any(n == 1 and m > 32 for n, m in _lens(case))),
        ("a tile less one", lambda case: {15, 31, 63} & set(case.lens_q)),
        ("a tile", lambda case: {16, 32, 64} & set(case.lens_q)),
        ("a tile and one", lambda case: {17, 33, 65} & set(case.lens_q)),
        *[(f"{place} pads", lambda case, place=place: case.placement == place) for place in ("left", "right", "both")],
        *[(f"packed {place}", lambda case, place=place: case.placement == place) for place in ("gaps", "shuffled")],
        *[(f"key_mask {kind}", lambda case, kind=kind: case.key_mask == kind) for kind in ("random", "hole", "all")],
        *[
            (f"{memory} {layout}", partial(_is_laid_out, memory=memory, is_padded=layout == "padded"))
            for memory in ("contiguous", "head_major", "fused_qkv", "gapped")
            for layout in ("packed", "padded")
        ],
        *[(f"dout {kind}", lambda case, kind=kind: case.dout == kind) for kind in ("dense", "expanded", "transposed")],
        ("a gradient of lse", lambda case: case.has_dlse),
        ("a value head of another size", lambda case: case.head_dim != case.value_dim),
        ("a negative scale", lambda case: (case.softmax_scale or 0) < 0),
        ("a maximum length too small", lambda case: case.max_input_len == "too_small"),
    ],
)
def test_cases_cover(what: str, is_covered):
    found = [case for case in CASES if is_covered(case)]
    assert len({case.dtype for case in found}) == 2, f"{what}: {len(found)} cases of {len(CASES)}"


def test_there_are_enough_cases_of_features():
    assert len({str(case) for case in FEATURE_CASES}) >= 200


FEATURE_NAMES = ("window", "softcap", "sinks")
COMBINATIONS = [chosen for chosen in itertools.product((False, True), repeat=3) if any(chosen)]


@pytest.mark.parametrize(
    ("what", "is_covered", "enough"),
    [
        *[
            (" and ".join(itertools.compress(FEATURE_NAMES, chosen)), lambda case, c=chosen: features(case) == c, 12)
            for chosen in COMBINATIONS
        ],
        *[(name, lambda case, i=i: features(case)[i], 100) for i, name in enumerate(FEATURE_NAMES)],
        *[
            (f"{name}, {layout}", lambda case, i=i, p=is_padded: features(case)[i] and case.is_padded == p, 40)
            for i, name in enumerate(FEATURE_NAMES)
            for layout, is_padded in (("packed", False), ("padded", True))
        ],
        *[
            (
                f"a window of {sides}, {'causal' if is_causal else 'full'}",
                lambda case, s=has_sides, c=is_causal: (
                    tuple(n >= 0 for n in case.window_size) == s and case.is_causal == c
                ),
                5,
            )
            for sides, has_sides in (
                ("keys before", (True, False)),
                ("keys behind", (False, True)),
                ("both", (True, True)),
            )
            for is_causal in (False, True)
        ],
        *[
            (f"{name} with {kind}", lambda case, i=i, has=has: features(case)[i] and has(case), 5)
            for i, name in enumerate(FEATURE_NAMES)
            for kind, has in (
                ("a key_mask", lambda case: case.key_mask is not None),
                ("a gradient of lse", lambda case: case.has_dlse),
                ("queries without keys", lambda case: any(n > m for n, m in _lens(case))),
                ("grouped heads", lambda case: case.group_size > 1),
                ("a value head of another size", lambda case: case.head_dim != case.value_dim),
            )
        ],
    ],
)
def test_cases_of_features_cover(what: str, is_covered, enough: int):
    found = [case for case in FEATURE_CASES if is_covered(case)]
    assert len(found) >= enough, f"{what}: {len(found)} cases of {len(FEATURE_CASES)}"
    assert len({case.dtype for case in found}) == 2, what
