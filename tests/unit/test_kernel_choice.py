"""Which kernel runs a call: FA_OPS_KERNEL, and what the sm_90 kernel takes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fa_ops import hopper, hopper_backward
from fa_ops.kernels import tier
from tests.support.problems import small_case

ROOT = Path(__file__).parents[2]
SUPPORTED = small_case(dtype=torch.bfloat16, head_dim=128, value_dim=128)


def refusal_of(case=SUPPORTED, **other) -> str | None:
    inputs = case.build()
    call = {
        "softmax_scale": case.softmax_scale or 0.1, "window_left": -1, "softcap": 0.0, "sinks": None,
        "block_table": None, "skip_blocks": None,
    } | other  # fmt: skip
    return hopper.unsupported(inputs.q, inputs.k, inputs.v, inputs.b_seq_len, *call.values())


def run_with(choice: str, code: str) -> subprocess.CompletedProcess:
    env = os.environ | {"FA_OPS_KERNEL": choice, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_the_choice_is_in_the_cache_key():
    """AOTAutograd caches what the op's body did: the other choice must not find it."""
    code = """
import fa_ops
from torch._library.triton import get_triton_kernels_for_op
print(*[kernel.__name__ for kernel in get_triton_kernels_for_op("modelopt::varlen_attention")])
"""
    kernels = {choice: run_with(choice, code).stdout for choice in tier.TIERS}
    assert kernels["portable"]
    assert kernels["portable"] != kernels["auto"]


def test_takes_what_it_is_made_for():
    assert refusal_of() is None
    for memory in ("contiguous", "head_major", "fused_qkv"):
        for is_padded in (False, True):
            case = dataclasses.replace(SUPPORTED, memory=memory, is_padded=is_padded, placement="right")
            assert refusal_of(case) is None, str(case)


@pytest.mark.parametrize(("head_dim", "blocks"), [(64, (64, 128)), (128, (64, 128)), (256, (64, 64))])
def test_takes_blocks_of_skip_softmax(head_dim: int, blocks: tuple[int, int]):
    case = dataclasses.replace(SUPPORTED, head_dim=head_dim, value_dim=head_dim)
    assert refusal_of(case, skip_blocks=blocks) is None


@pytest.mark.parametrize(
    ("case", "other", "reason"),
    [
        (dataclasses.replace(SUPPORTED, dtype=torch.float32), {}, "dtype torch.float32"),
        (dataclasses.replace(SUPPORTED, head_dim=80, value_dim=80), {}, "head dimensions 80 and 80"),
        (dataclasses.replace(SUPPORTED, value_dim=64), {}, "head dimensions 128 and 64"),
        (dataclasses.replace(SUPPORTED, head_dim=256, value_dim=256), {"window_left": 5}, "window_left"),
        (dataclasses.replace(SUPPORTED, memory="gapped"), {}, "q: strides"),
        (SUPPORTED, {"softmax_scale": -0.1}, "softmax_scale"),
        (SUPPORTED, {"softmax_scale": 0.0}, "softmax_scale"),
        (SUPPORTED, {"softcap": 3.0}, "softcap"),
        (SUPPORTED, {"sinks": torch.zeros(4)}, "sinks"),
        (SUPPORTED, {"block_table": torch.zeros(2, 4, dtype=torch.int32)}, "block_table"),
        (SUPPORTED, {"skip_blocks": (64, 64)}, "skip_softmax_block"),
        (SUPPORTED, {"skip_blocks": (128, 128)}, "skip_softmax_block"),
        (dataclasses.replace(SUPPORTED, head_dim=256, value_dim=256), {"skip_blocks": (64, 128)}, "skip_softmax_block"),
        (SUPPORTED, {"skip_blocks": (64, 128), "window_left": 5}, "window_left with skip_softmax_threshold"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refuses_the_rest_by_name(case, other: dict, reason: str):
    found = refusal_of(case, **other)
    assert found is not None
    assert found.startswith(reason)


def strided(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    size = 1 + offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.empty(size, dtype=torch.bfloat16, device="meta").as_strided(shape, strides, offset)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "reason"),
    [
        ((5, 2, 64), (128, 64, 1), 0, None),
        ((5, 2, 64), (128, 64, 1), 8, None),
        ((5, 2, 64), (128, 64, 1), 4, "strides (128, 64, 1) at offset 4"),
        ((5, 2, 64), (132, 64, 1), 0, "strides (132, 64, 1) at offset 0"),
        ((5, 2, 64), (64, 0, 1), 0, "strides (64, 0, 1) at offset 0"),
        ((3, 5, 2, 64), (640, 128, 64, 1), 0, None),
        ((3, 5, 2, 64), (704, 128, 64, 1), 0, "batch stride 704 is no multiple of the row stride 128"),
        ((2**30 + 1, 1, 64), (64, 64, 1), 0, "more than 1073741824 rows"),
        ((3, 5, 2, 64), (64 * 2**30, 64, 320, 1), 0, "more than 1073741824 rows"),
    ],
)
def test_layouts(shape: tuple, strides: tuple, offset: int, reason: str | None):
    q = strided(shape, strides, offset)
    length = torch.empty(1, dtype=torch.int32, device="meta")
    found = hopper.unsupported(q, q, q, length, 0.1, -1, 0.0, None, None, None)
    assert found == (None if reason is None else f"q: {reason}")


def test_padded_queries_of_one_row():
    k = strided((3, 5, 2, 64), (640, 128, 64, 1))
    length = torch.empty(3, dtype=torch.int32, device="meta")
    for q, reason in ((k[:, :1], "padded queries of one row"), (k[:, :2], None)):
        assert hopper.unsupported(q, k, k, length, 0.1, -1, 0.0, None, None, None) == reason


def test_number_of_tiles():
    q = strided((2**30, 1, 64), (64, 64, 1))
    for num_seqs, reason in ((2**26, None), (2**27, "number of tiles")):
        length = torch.empty(num_seqs, dtype=torch.int32, device="meta")
        assert hopper.unsupported(q, q, q, length, 0.1, -1, 0.0, None, None, None) == reason


def test_number_of_blocks():
    """Bits of a sparse call, and rows of all heads, are indexed by 32-bit numbers."""
    length = torch.empty(1, dtype=torch.int32, device="meta")
    for rows, reason in ((2**21, None), (2**22, "number of blocks")):
        q = strided((rows, 32, 64), (32 * 64, 64, 1))
        assert hopper.unsupported(q, q, q, length, 0.1, -1, 0.0, None, None, (64, 128)) == reason
        assert hopper.unsupported(q, q, q, length, 0.1, -1, 0.0, None, None, None) is None


def test_device_and_version(monkeypatch):
    q = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(hopper, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "_triton_version", lambda: "3.9")
    monkeypatch.setattr(tier, "TIER", "portable")
    assert hopper.refusal(q) == "FA_OPS_KERNEL is 'portable'"
    monkeypatch.setattr(tier, "TIER", "auto")
    assert hopper.refusal(q) == "Triton 3.9 is none of 3.6, 3.7"
    monkeypatch.setattr(hopper, "_capability", lambda device: (10, 0))
    assert hopper.refusal(q) == "cuda:0 is not of sm_90"


def backward_refusal(q: torch.Tensor, **changes) -> str | None:
    length = torch.empty(3, dtype=torch.int32, device="meta")
    call = {"softmax_scale": 0.1, "window_left": -1, "softcap": 0.0, "threshold": None} | changes
    return hopper_backward.unsupported(q, q, q, length, **call)


def test_what_the_backward_kernels_take():
    q = strided((3, 5, 2, 64), (640, 128, 64, 1))
    assert backward_refusal(q) is None
    assert backward_refusal(strided((5, 2, 256), (512, 256, 1))) == "head dimension 256"
    assert backward_refusal(q.float()) == "dtype torch.float32"
    for name, value, reason in (
        ("window_left", 3, "window_left"),
        ("softcap", 2.0, "softcap"),
        ("threshold", q, "skip_softmax_threshold"),
        ("softmax_scale", -1.0, "softmax_scale"),
    ):
        assert backward_refusal(q, **{name: value}) == reason


def test_when_the_backward_kernels_run(monkeypatch):
    q = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(hopper, "_capability", lambda device: (10, 0))
    for choice, reason in (("portable", "FA_OPS_KERNEL is 'portable'"), ("auto", "cuda:0 is not of sm_90")):
        monkeypatch.setattr(tier, "TIER", choice)
        assert hopper_backward.refusal(q) == reason


@pytest.mark.parametrize(
    ("shape", "num_seqs", "expected"),
    [
        ((32768, 8, 128), 1, 1),
        ((131072, 8, 128), 1, 1),  # one head alone is more than there is room for
        ((4, 8192, 8, 128), 4, 4),
        ((32768, 8, 128), 4, 4),  # packed, the same on average
        ((4, 8192, 6, 128), 4, 3),  # four fit, and do not divide six
        ((4096, 8, 64), 64, 8),
        ((3, 8, 64), 64, 8),
    ],
)
def test_as_many_heads_at_once_as_leave_their_keys_in_the_cache(shape, num_seqs: int, expected: int):
    keys = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    assert hopper.heads_at_once(keys, torch.empty(num_seqs), shape[-2]) == expected
