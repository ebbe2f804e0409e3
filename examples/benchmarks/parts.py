"""What a run measures, part by part: dense attention, decoding, skip-softmax, prefill, host time, memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import decode
import prefill
import sparsity
from cases import DIRECTIONS, Case, cpu_cases, goal_cases, more_cases, overhead_case
from comparing import TOLERANCE, against_reference, compare, error_text, has_run
from memory import MEMORY_LENGTH, measure_in_subprocess, memory_case
from peers import PEERS, Data, make_data
from report import Row, case_columns
from timing import Clock, Run, call_overhead, interleave, summary

from fa_ops.sparsity.config import FlashSkipSoftmaxConfig

SECONDS_PER_RUN = {"cpu": 3.0, "cuda": 0.25}
Prepare = Callable[[Case, Data], Run]


@dataclass(frozen=True)
class Part:
    """Something to measure: its rows, known beforehand but for their figures, and the function that returns them with
    these."""

    name: str
    planned: list[Row]
    measure: Callable[[], list[Row]]


def cpu_parts(quick: bool, externals: dict[str, Prepare], clock: Clock, rounds: int) -> list[Part]:
    cells = [case_part(case, externals, "cpu", clock, rounds) for case in cpu_cases(quick)]
    return [*cells, overhead_part("cpu"), memory_part(MEMORY_LENGTH // 4 if quick else MEMORY_LENGTH)]


def cuda_parts(quick: bool, externals: dict[str, Prepare], clock: Clock, rounds: int) -> list[Part]:
    """The goals' parts come first: a time limit cuts the end."""
    dense = [case_part(case, externals, "cuda", clock, rounds) for case in goal_cases().values()]
    decodings = [decode_part(case, "cuda", clock, rounds) for case in decode.decode_cases()]
    skip_8k, skip_32k, skip_128k = (skip_part(case, "cuda", clock) for case in sparsity.cases("cuda"))
    first = [
        copy_part("cuda", clock, rounds),
        overhead_part("cuda"),
        *dense[:6],
        *decodings[:4],
        skip_32k,
        *dense[6:8],
        *prefill_parts("cuda", clock),
        *decodings[4:6],
        *dense[8:],
        skip_8k,
    ]
    if quick:
        return first
    more = [case_part(case, externals, "cuda", clock, rounds) for case in more_cases()]
    return [*first, *decodings[6:], *more[:4], skip_128k, *more[4:]]


def case_part(case: Case, externals: dict[str, Prepare], device: str, clock: Clock, rounds: int) -> Part:
    planned = [
        case_columns(case) | {"direction": direction, "impl": impl}
        for direction in DIRECTIONS[device]
        for impl in (*case.impls, *externals)
    ]
    name = f"{case.name}, {case.dtype}, {case.num_heads_q}/{case.num_heads_kv} heads, D {case.head_dim}"
    return Part(name, planned, lambda: bench_case(case, externals, device, clock, rounds))


def copy_part(device: str, clock: Clock, rounds: int, size: int = decode.COPIED_BYTES) -> Part:
    planned = decode.planned_copy(size)
    return Part(
        f"decode: {planned['case']} beside it", [planned], lambda: decode.bench_copy(device, clock, rounds, size)
    )


def decode_part(case: decode.DecodeCase, device: str, clock: Clock, rounds: int) -> Part:
    name = f"decode {case.columns['case']}, {case.num_heads_q}/{case.num_heads_kv} heads"
    return Part(name, case.planned(), lambda: decode.bench_decode(case, device, clock, rounds))


def skip_part(case: Case, device: str, clock: Clock) -> Part:
    config = FlashSkipSoftmaxConfig()
    block, direction = (config.br, config.bc), {"direction": "skip_softmax"}
    planned = [row | direction for row in sparsity.planned(case, block).values()]
    name = f"skip-softmax {case.name}"
    return Part(name, planned, lambda: [row | direction for row in sparsity.bench_case(case, device, clock, block)])


def prefill_parts(device: str, clock: Clock) -> list[Part]:
    models: dict[str, object] = {}  # made by the first of the parts that is run, freed behind the last

    def measure(layout: str) -> list[Row]:
        try:
            models.update(models or prefill.make_models(device))
        except ImportError as error:
            return [row | {"skipped": f"not run: {error_text(error)}"} for row in prefill.planned(layout)]
        try:
            return prefill.bench_prefill(models, layout, clock)
        finally:
            if layout == prefill.LAYOUTS[-1]:
                models.clear()

    return [Part(f"prefill, {layout}", prefill.planned(layout), partial(measure, layout)) for layout in prefill.LAYOUTS]


def overhead_part(device: str) -> Part:
    case = overhead_case(device)
    planned = [case_columns(case) | {"direction": "call_overhead", "impl": impl} for impl in case.impls]
    return Part("call overhead", planned, lambda: bench_call_overhead(device))


def memory_part(length: int) -> Part:
    case = memory_case(length)
    planned = [
        case_columns(case) | {"direction": direction, "impl": impl}
        for direction in ("forward", "forward_backward")
        for impl in case.impls
    ]
    return Part("memory", planned, lambda: bench_memory(planned, length))


def bench_case(case: Case, externals: dict[str, Prepare], device: str, clock: Clock, rounds: int) -> list[Row]:
    """The rows of one case: every direction and every implementation, those that raise included."""
    data = make_data(case, device)
    prepared: dict[str, Run] = {}
    failures: dict[str, Row] = {}
    impls = {name: PEERS[name] for name in case.impls} | externals
    for impl, prepare in impls.items():
        try:
            prepared[impl] = prepare(case, data)
        except Exception as error:
            failures[impl] = {"error": error_text(error)}
    rows: list[Row] = []
    for direction in DIRECTIONS[device]:
        findings = failures | compare(prepared, direction, TOLERANCE[case.dtype])
        if direction == "forward" and findings["fa_ops"] == {}:
            findings["fa_ops"] = against_reference(prepared["fa_ops"], case, data)
        runs = {impl: run for impl, run in prepared.items() if has_run(findings[impl])}
        samples = interleave(runs, direction, clock, rounds, SECONDS_PER_RUN[device] * len(runs))
        for impl in impls:
            row = case_columns(case) | {"direction": direction, "impl": impl} | findings[impl]
            if impl in samples:
                figures = summary(samples[impl])
                row |= figures | {"tflops": case.flops(direction) / figures["median_ms"] / 1e9}
            rows.append(row)
    return rows


def bench_call_overhead(device: str) -> list[Row]:
    """Host time of one forward call on inputs so small that the computation does not count."""
    case = overhead_case(device)
    data = make_data(case, device)
    rows: list[Row] = []
    for impl in case.impls:
        row = case_columns(case) | {"direction": "call_overhead", "impl": impl}
        try:
            row |= summary(call_overhead(PEERS[impl](case, data).forward, device))
        except Exception as error:
            row["error"] = error_text(error)
        rows.append(row)
    return rows


def bench_memory(planned: list[Row], length: int) -> list[Row]:
    rows = []
    for row in planned:
        try:
            rows.append(row | {"peak_extra_mib": measure_in_subprocess(row["impl"], row["direction"], length)})
        except Exception as error:
            rows.append(row | {"error": error_text(error)})
    return rows
