"""The backward for sm_90 in Python, as the forward in test_hopper.py."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

import fa_ops
from fa_ops import hopper, hopper_backward
from fa_ops.kernels import backward_tiles
from fa_ops.kernels import hopper as forward_kernels
from fa_ops.kernels import hopper_backward as kernels
from fa_ops.kernels.configs import HOPPER_BACKWARD_TILES, HopperTile
from tests.support.accuracy import AccuracyError, check_case, evaluate
from tests.support.cases import Case
from tests.support.draw import Profile
from tests.support.gluon import EmulatedKernel, EmulationError
from tests.support.hopper import draw_many_backward
from tests.support.memory import CanaryError
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits, check_nan_isolation

PROFILE = Profile(
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (128, 128)),
    max_len=450,
    max_rows_by_heads=900,
    max_seqs=4,
    feature_rate=0.0,
)
PROGRAMS = 3
KERNELS = ("hopper_dq_kernel", "hopper_dkv_kernel")
CASES = draw_many_backward(PROFILE, 120)


@pytest.fixture
def launches(monkeypatch) -> list:
    """Backward calls run the kernels here; holds the arguments of each launch."""
    taken = []

    def backward(*args):
        taken.append(args)
        return hopper_backward.launch(*args)

    monkeypatch.setattr(hopper_backward, "refusal", hopper_backward.unsupported)
    monkeypatch.setattr(hopper_backward, "backward", backward)
    monkeypatch.setattr(hopper_backward, "multi_processors", lambda device: PROGRAMS)
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, EmulatedKernel(kernels, name))
    # the interpreter's products of matrices do not know bfloat16
    monkeypatch.setattr(hopper, "refusal", hopper.unsupported)
    monkeypatch.setattr(hopper, "forward", hopper.launch)
    monkeypatch.setattr(
        forward_kernels, "hopper_forward_kernel", EmulatedKernel(forward_kernels, "hopper_forward_kernel")
    )
    return taken


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if n % 24 else (), id=str(case)) for n, case in enumerate(CASES)]
)
def test_accuracy(case: Case, launches):
    check_case(fa_ops.attention, case)
    assert launches
