"""Attention beside what a user would take instead, on the device that is there, and the project's goals for speed.

    python examples/benchmarks/run.py [--quick] [--only PATTERN] [--device cpu|cuda] [--output DIR]
        [--peer module:function]

All implementations of a cell are timed in turn on the same random data, after their results have been compared. Writes
DIR/<device>.csv, DIR/<device>.png, DIR/sparsity-<device>.png and DIR/goals-<device>.md, and prints a table. The exit
status is 1 when fa_ops fails, or when an implementation's result differs from it. README.md beside this says how each
figure is measured.
"""

import argparse
import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import goals
import sparsity
import torch
from cases import goal_cases
from comparing import error_text
from environment import describe, device_kind
from parts import Part, cpu_parts, cuda_parts
from peers import load_external
from plot import is_drawn, write_plot
from report import Row, add_ratios, bar_lines, cut_off, table, twin_lines, write_csv
from timing import CpuClock, CudaClock

from fa_ops.kernels import tier

MAX_ROUNDS = {"cpu": 50, "cuda": 20}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = options.device
    sys.path.insert(0, str(Path.cwd()))  # a peer's module may lie there
    externals = {path: load_external(path) for path in options.peer}
    load_before = f"{os.getloadavg()[0]:.1f}"
    clock = CudaClock() if device == "cuda" and not options.list else CpuClock()
    make_parts = cpu_parts if device == "cpu" else cuda_parts
    todo = selected(make_parts(options.quick, externals, clock, options.rounds), options.only)
    if options.list:
        print(*(part.name for part in todo), sep="\n")
        return 0
    rows: list[Row] = []
    try:
        measure_parts(todo, options.time_limit, rows)
    finally:
        columns = describe(device) | {"load_before": load_before, "tier": tier.TIER}
        rows[:] = [row | columns for row in rows]
        add_ratios(rows, [*goal_cases().values()])
        path = options.output / device_kind(device)
        options.output.mkdir(parents=True, exist_ok=True)
        write_csv(rows, path.with_suffix(".csv"))
        write_goals(rows, path.with_name(f"goals-{path.name}.md"), options)
    print(" | ".join(f"{name} {value}" for name, value in columns.items() if value))
    print(table(rows), *twin_lines(rows), *sparsity.conclusions(skip_rows(rows)), *bar_lines(rows), sep="\n")
    print("", path.with_name(f"goals-{path.name}.md").read_text(), sep="\n")
    print(f"wrote {path.with_suffix('.csv')}", file=sys.stderr)
    plot(rows, path, f"{columns['card']}, torch {columns['torch']}, {columns['date']}")
    return int(any("error" in row and (sparsity.is_ours(row) or "difference" in row) for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the goals' workloads alone, within two minutes")
    parser.add_argument("--only", type=re.compile, metavar="PATTERN", help="run the parts in whose name this regular "
                        "expression is found; --list prints the names")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the parts and measure nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE:FUNCTION", help="called with packed q, "
                        "k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, returning out; may be "
                        "repeated")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="the most samples of each figure")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further part is begun")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or MAX_ROUNDS[options.device]
    options.time_limit = options.time_limit or (110 if options.quick else 270)
    return options


def selected(parts: list[Part], only: re.Pattern[str] | None) -> list[Part]:
    """The parts in whose name the expression is found."""
    found = [part for part in parts if only is None or only.search(part.name)]
    if only is not None and not found:
        raise SystemExit(f"--only: {only.pattern!r} given, which is found in no part's name; --list prints them")
    return found


def measure_parts(parts: list[Part], time_limit: float, rows: list[Row]) -> None:
    """Appends the rows of all parts, measured or with the reason that they are not."""
    start = time.monotonic()
    for index, part in enumerate(parts):
        seconds = time.monotonic() - start
        print(f"[{index + 1}/{len(parts)}] {seconds:.0f} s: {part.name}", file=sys.stderr, flush=True)
        if seconds > time_limit:
            rows += [row | cut_off(time_limit) for row in part.planned]
            continue
        try:
            rows += part.measure()
        except Exception as error:
            rows += [row | {"error": error_text(error)} for row in part.planned]
        free_memory()


def free_memory() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def skip_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["direction"] == "skip_softmax"]


def write_goals(rows: list[Row], path: Path, options: argparse.Namespace) -> None:
    absent = "not run: left out by --quick" if options.quick else goals.ABSENT
    if options.only is not None:
        absent = f"not run: left out by --only {options.only.pattern}"
    path.write_text(goals.markdown(rows, options.device, absent))


def plot(rows: list[Row], path: Path, title: str) -> None:
    """TFLOP/s, and the speed-up of skip-softmax over the share that it drops, as far as they have been measured."""
    pictures: dict[Path, Callable[[Path], None]] = {}
    if any(is_drawn(row) for row in rows):
        pictures[path.with_suffix(".png")] = partial(write_plot, rows, title=title)
    if any("speed_over_dense" in row for row in rows):
        pictures[path.with_name(f"sparsity-{path.name}.png")] = partial(sparsity.plot, skip_rows(rows))
    if not pictures:
        print("no plot: nothing was timed", file=sys.stderr)
    for target, draw in pictures.items():
        try:
            draw(target)
        except ImportError as error:
            print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)
        else:
            print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been measured is written
    sys.exit(main())
