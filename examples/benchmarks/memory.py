"""Peak memory of one CPU call beyond its inputs and its results, measured in a fresh process.

    python examples/benchmarks/memory.py fa_ops forward 8192

prints mebibytes. The figure is the process's peak resident size (VmHWM) less its resident size right before the call
and less the bytes that the call returns, so it counts everything: PyTorch's allocator, scratch buffers, stacks. A call
on a short sequence comes first and loads what is loaded lazily. Where the peak was reached before the call, the figure
is an upper bound. (ru_maxrss would not do: a child process inherits its parent's.)
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from cases import Case
from peers import PEERS, make_data
from timing import Run

MEMORY_LENGTH = 8192


def memory_case(length: int) -> Case:
    return Case(f"1 x {length}, causal", "float32", 8, 2, 64, (length,), True, ("fa_ops", "sdpa_sum"))


def call(run: Run, direction: str) -> tuple[torch.Tensor, ...]:
    if direction == "forward":
        with torch.no_grad():
            return run.forward()
    outputs = run.forward()
    return (*outputs, *run.backward(outputs))


def resident_bytes(field: str) -> int:
    """The process's resident size, now (VmRSS) or at its peak (VmHWM)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].removesuffix("kB")) * 1024


def extra_mebibytes(impl: str, direction: str, length: int) -> float:
    warmup, case = memory_case(64), memory_case(length)
    call(PEERS[impl](warmup, make_data(warmup, "cpu")), direction)
    data = make_data(case, "cpu")
    run = PEERS[impl](case, data)
    before = resident_bytes("VmRSS")
    results = call(run, direction)
    returned = sum(result.numel() * result.element_size() for result in results)
    return (resident_bytes("VmHWM") - before - returned) / 2**20


def measure_in_subprocess(impl: str, direction: str, length: int) -> float:
    """extra_mebibytes in a process of its own, whose allocator holds no freed memory that could hide an allocation."""
    if sys.platform != "linux":
        raise NotImplementedError(f"peak memory is read from Linux's /proc/self/status, this is {sys.platform}")
    result = subprocess.run(
        [sys.executable, __file__, impl, direction, str(length)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return float(result.stdout)


if __name__ == "__main__":
    print(extra_mebibytes(sys.argv[1], sys.argv[2], int(sys.argv[3])))
