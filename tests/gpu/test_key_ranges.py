"""Key ranges that overlap stop the device where a gradient is asked for, and cost others no synchronisation."""

import subprocess
import sys

import pytest
import torch

import fa_ops

pytestmark = pytest.mark.gpu

OVERLAP = """
import torch, fa_ops
q, k, v = (torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
start, length = (torch.tensor(t, device="cuda") for t in ([0, 4], [4, 4]))
keys, lengths = (torch.tensor(t, device="cuda") for t in ([0, {second}], [5, 3]))
out = fa_ops.attention(q, k, v, start, length, b_start_loc_k=keys, b_seq_len_k=lengths)
out.sum().backward()
torch.cuda.synchronize()
print("ran")
"""


def _run(second: int) -> subprocess.CompletedProcess:
    """In a process of its own: a failed assertion ends the CUDA context."""
    return subprocess.run(
        [sys.executable, "-c", OVERLAP.format(second=second)], capture_output=True, text=True, timeout=240
    )


def test_overlapping_ranges_stop_the_device():
    assert _run(5).stdout == "ran\n"
    overlapping = _run(4)
    assert overlapping.returncode != 0
    assert "ran" not in overlapping.stdout
    assert "assert" in overlapping.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_disjoint_ranges_in_a_cuda_graph(dtype):
    q, k, v = (torch.randn(9, 2, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in "qkv")
    ranges = [torch.tensor(t, device="cuda") for t in ([0, 4], [4, 4], [5, 0], [3, 5])]

    def step():
        out = fa_ops.attention(q, k, v, *ranges[:2], b_start_loc_k=ranges[2], b_seq_len_k=ranges[3])
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
