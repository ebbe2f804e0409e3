"""Attention forward and backward, fa_ops against what a user would take instead, on the device that is there.

    python examples/benchmarks/run.py [--quick] [--device cpu|cuda] [--output DIR] [--peer module:function]

All implementations of a cell are timed in turn on the same random data, after their results have been compared. Writes
DIR/<device>.csv and DIR/<device>.png and prints a table. The exit status is 1 when fa_ops fails, or when an
implementation's result differs from it. README.md beside this says how each figure is measured.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from cases import DIRECTIONS, Case, cpu_cases, cuda_cases
from environment import describe, device_kind
from memory import MEMORY_LENGTH, measure_in_subprocess, memory_case
from peers import PEERS, Data, load_external, make_data
from plot import write_plot
from report import Row, add_ratios, bar_lines, case_columns, table, twin_lines, write_csv
from timing import Clock, CpuClock, CudaClock, Run, call_overhead, interleave, summary

TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 3e-2}
MAX_ROUNDS = {"cpu": 50, "cuda": 20}
SECONDS_PER_RUN = {"cpu": 3.0, "cuda": 0.25}
Prepare = Callable[[Case, Data], Run]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = options.device
    sys.path.insert(0, str(Path.cwd()))  # a peer's module may lie there
    externals = {path: load_external(path) for path in options.peer}
    cases = (cpu_cases if device == "cpu" else cuda_cases)(options.quick)
    load_before = f"{os.getloadavg()[0]:.1f}"
    rows: list[Row] = []
    try:
        bench_cases(cases, externals, options, rows)
        bench_call_overhead(device, rows)
        if device == "cpu":
            bench_memory(rows, MEMORY_LENGTH // 4 if options.quick else MEMORY_LENGTH)
    finally:
        columns = describe(device) | {"load_before": load_before}
        rows[:] = [row | columns for row in rows]
        add_ratios(rows)
        path = options.output / device_kind(device)
        options.output.mkdir(parents=True, exist_ok=True)
        write_csv(rows, path.with_suffix(".csv"))
    print(" | ".join(f"{name} {value}" for name, value in columns.items() if value))
    print(table(rows), *twin_lines(rows, cases), *bar_lines(rows), sep="\n")
    print(f"wrote {path.with_suffix('.csv')}", file=sys.stderr)
    plot(rows, path.with_suffix(".png"), f"{columns['card']}, torch {columns['torch']}, {columns['date']}")
    return int(any("error" in row and (row["impl"] == "fa_ops" or "difference" in row) for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a telling subset, within two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--peer", action="append", default=[], help="module:function, called with packed q, k, v, "
                        "cu_seqlens, max_seqlen, is_causal, returning out; may be repeated")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="the most samples of each figure")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further case is begun")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or MAX_ROUNDS[options.device]
    options.time_limit = options.time_limit or (110 if options.quick else 280)
    return options


def bench_cases(cases: list[Case], externals: dict[str, Prepare], options: argparse.Namespace, rows: list[Row]) -> None:
    clock: Clock = CpuClock() if options.device == "cpu" else CudaClock()
    deadline = time.monotonic() + options.time_limit
    for index, case in enumerate(cases):
        print(f"[{index + 1}/{len(cases)}] {case.name}, {case.dtype}, D {case.head_dim}", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            reason = f"not run: the time limit of {options.time_limit:g} s had passed"
            for direction in DIRECTIONS[options.device]:
                rows += [
                    case_columns(case) | {"direction": direction, "impl": impl, "skipped": reason}
                    for impl in (*case.impls, *externals)
                ]
            continue
        rows += bench_case(case, externals, options.device, clock, options.rounds)


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
        runs = {impl: run for impl, run in prepared.items() if has_run(findings[impl])}
        samples = interleave(runs, direction, clock, rounds, SECONDS_PER_RUN[device] * len(runs))
        for impl in impls:
            row = case_columns(case) | {"direction": direction, "impl": impl} | findings[impl]
            if impl in samples:
                figures = summary(samples[impl])
                row |= figures | {"tflops": case.flops(direction) / figures["median_ms"] / 1e9}
            rows.append(row)
    return rows


def compare(prepared: dict[str, Run], direction: str, tolerance: float) -> dict[str, Row]:
    """Run each implementation once: the relative difference of its results from those of fa_ops, and an error where
    that is above the tolerance or where it raises."""
    findings: dict[str, Row] = {}
    ours: list[torch.Tensor] | None = None
    for impl, run in prepared.items():
        try:
            results = packed_results(run, direction)
        except Exception as error:
            findings[impl] = {"error": error_text(error)}
            continue
        findings[impl] = {}
        if impl == "fa_ops":
            ours = results
        elif ours is not None:
            difference = max(relative_difference(*pair) for pair in zip(results, ours, strict=True))
            findings[impl]["difference"] = difference
            if not difference <= tolerance:
                findings[impl]["error"] = f"differs from fa_ops by {difference:.1e}, more than {tolerance:.0e}"
    return findings


def has_run(finding: Row) -> bool:
    return "error" not in finding or "difference" in finding


def packed_results(run: Run, direction: str) -> list[torch.Tensor]:
    if direction == "forward":
        with torch.no_grad():
            return [run.pack_outputs(run.forward())]
    return [run.pack_gradient(gradient) for gradient in run.backward(run.forward())]


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()


def error_text(error: Exception) -> str:
    """One line: the error, and the one at the root of it, which compilers bury deep."""
    root: BaseException = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    texts = [f"{type(e).__name__}: {' '.join(str(e).split())}"[:300] for e in dict.fromkeys((error, root))]
    return "; from ".join(texts)


def bench_call_overhead(device: str, rows: list[Row]) -> None:
    """Host time of one forward call on inputs so small that the computation does not count."""
    dtype, impls = ("float32", ("fa_ops", "sdpa_sum")) if device == "cpu" else ("bfloat16", ("fa_ops", "torch_varlen"))
    case = Case("1 x 4, causal", dtype, 2, 2, 16 if device == "cpu" else 64, (4,), True, impls)
    data = make_data(case, device)
    for impl in impls:
        row = case_columns(case) | {"direction": "call_overhead", "impl": impl}
        try:
            row |= summary(call_overhead(PEERS[impl](case, data).forward, device))
        except Exception as error:
            row["error"] = error_text(error)
        rows.append(row)


def bench_memory(rows: list[Row], length: int) -> None:
    case = memory_case(length)
    for direction in ("forward", "forward_backward"):
        for impl in case.impls:
            row = case_columns(case) | {"direction": direction, "impl": impl}
            try:
                row["peak_extra_mib"] = measure_in_subprocess(impl, direction, length)
            except Exception as error:
                row["error"] = error_text(error)
            rows.append(row)


def plot(rows: list[Row], path: Path, title: str) -> None:
    if not any("tflops" in row for row in rows):
        print("no plot: nothing was timed", file=sys.stderr)
        return
    try:
        write_plot(rows, path, title)
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)
    else:
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
