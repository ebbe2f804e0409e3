"""Clocks for CPU and CUDA, and samples of several competitors taken in turn."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MIN_ROUNDS = 3
FLUSH_BYTES = 512 * 2**20  # several times the largest L2 there is
HEAD_START = 10  # flushes, about a millisecond of device time


@dataclass
class Run:
    """One implementation bound to one case's data, in its own layout.

    `forward` maps nothing to the tuple of outputs; `inputs` are the leaves (q, k, v) that it differentiates;
    `grad_outputs` match the outputs. `pack_outputs` and `pack_gradient` bring results back to (total, H, D), so that
    implementations can be compared.
    """

    inputs: tuple[torch.Tensor, ...]
    forward: Callable[[], tuple[torch.Tensor, ...]]
    grad_outputs: tuple[torch.Tensor, ...]
    pack_outputs: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]
    pack_gradient: Callable[[torch.Tensor], torch.Tensor]

    def backward(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, self.inputs, self.grad_outputs)


class Clock(Protocol):
    def begin_round(self) -> None: ...
    def start(self) -> Any: ...
    def stop(self) -> Any: ...
    def milliseconds(self, start: Any, stop: Any) -> float: ...


class CpuClock:
    def begin_round(self) -> None:
        """Nothing to prepare."""

    def start(self) -> int:
        return time.perf_counter_ns()

    stop = start

    def milliseconds(self, start: int, stop: int) -> float:
        return (stop - start) / 1e6


class CudaClock:
    """CUDA events around the region. The L2 cache is overwritten before each start, and the device gets a head start of
    work in each round, so that it never waits for Python inside a timed region."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def begin_round(self) -> None:
        for _ in range(HEAD_START):
            self.flushed.zero_()

    def start(self) -> torch.cuda.Event:
        self.flushed.zero_()
        return self.stop()

    def stop(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop)


def forward_step(run: Run, clock: Clock) -> tuple[Any, Any]:
    with torch.no_grad():
        start = clock.start()
        run.forward()
        return start, clock.stop()


def backward_step(run: Run, clock: Clock) -> tuple[Any, Any]:
    """Time the backward alone; the forward it needs runs before the clock starts."""
    outputs = run.forward()
    start = clock.start()
    run.backward(outputs)
    return start, clock.stop()


def forward_backward_step(run: Run, clock: Clock) -> tuple[Any, Any]:
    start = clock.start()
    run.backward(run.forward())
    return start, clock.stop()


STEPS = {"forward": forward_step, "backward": backward_step, "forward_backward": forward_backward_step}


def interleave(
    runs: dict[str, Run], direction: str, clock: Clock, max_rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every run, sampled in turn, so that drift and noise hit all of them alike. The order is drawn
    anew in each round, because every run finds the caches as its predecessor left them.

    A first round is thrown away. Sampling ends after `max_rounds` rounds, or once `seconds` have passed and there are
    MIN_ROUNDS rounds.
    """
    step = STEPS[direction]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    deadline = time.monotonic() + seconds
    for index in range(max_rounds + 1):
        shuffle(order)
        clock.begin_round()
        marks = {name: step(runs[name], clock) for name in order}
        durations = {name: clock.milliseconds(*marks[name]) for name in order}
        if index == 0:
            continue
        for name, duration in durations.items():
            samples[name].append(duration)
        if index >= MIN_ROUNDS and time.monotonic() > deadline:
            break
    return samples


def call_overhead(call: Callable[[], Any], device: str, calls: int = 2000) -> list[float]:
    """Milliseconds of host time of each of `calls` calls under no_grad: Python and dispatch. The device is drained
    every 64 calls, outside the timed region, so that no call waits for a full launch queue."""
    durations = []
    with torch.no_grad():
        for index in range(calls + calls // 10):
            if device == "cuda" and index % 64 == 0:
                torch.cuda.synchronize()
            start = time.perf_counter_ns()
            call()
            durations.append((time.perf_counter_ns() - start) / 1e6)
    return durations[calls // 10 :]


def summary(samples: list[float]) -> dict[str, float]:
    return {
        "median_ms": statistics.median(samples),
        "min_ms": min(samples),
        "max_ms": max(samples),
        "samples": len(samples),
    }
