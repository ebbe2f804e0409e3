"""What a benchmark leaves behind: the CSV, the plot, the printed table and the bars."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Case

COLUMNS = (
    "case", "dtype", "num_heads_q", "num_heads_kv", "head_dim", "batch", "lengths", "is_causal", "direction", "impl",
    "median_ms", "min_ms", "max_ms", "samples", "tflops", "ours_over_impl", "ours_over_impl_of_min",
    "over_twin", "over_twin_cudnn", "gb_per_s", "share_of_copy", "share_of_h200",
    "br", "bc", "wanted", "threshold", "share", "speed_over_dense", "speed_over_cudnn", "speed_over_flash",
    "difference", "peak_extra_mib", "error", "skipped",
    "device", "card", "clocks", "threads", "load_before", "tier",
    "python", "torch", "triton", "cuda", "cudnn", "driver", "commit", "date",
)  # fmt: skip
KEY = ("case", "dtype", "num_heads_q", "num_heads_kv", "head_dim", "is_causal", "direction")
H200_GB_PER_S = 4300.0  # copied by an H200

Row = dict[str, Any]


def case_columns(case: Case) -> Row:
    lengths = f"{len(case.lengths)} x {case.lengths[0]}" if case.is_fixed_length else " ".join(map(str, case.lengths))
    return {
        "case": case.name,
        "dtype": case.dtype,
        "num_heads_q": case.num_heads_q,
        "num_heads_kv": case.num_heads_kv,
        "head_dim": case.head_dim,
        "batch": len(case.lengths),
        "lengths": lengths,
        "is_causal": case.is_causal,
    }


def add_ratios(rows: list[Row], cases: Sequence[Case]) -> None:
    """Adds what follows from several rows.

    ours_over_impl: the speed of fa_ops over the speed of the row's implementation in the same cell, from medians, and
    from the fastest samples, which tell more on a machine that is shared. over_twin and over_twin_cudnn: TFLOP/s of
    fa_ops over its own, and over cuDNN's, on the twin of the row's case. share_of_copy and share_of_h200: bytes per
    second over those that the card copied in this run, and over an H200's.
    """
    ours = {cell(row): row for row in rows if row["impl"] == "fa_ops" and "median_ms" in row}
    speeds = {(row["case"], row["direction"], row["impl"]): row["tflops"] for row in rows if "tflops" in row}
    twins = {case.name: case.twin for case in cases if case.twin is not None}
    copied = next((row["gb_per_s"] for row in rows if row["direction"] == "copy" and "gb_per_s" in row), None)
    for row in rows:
        if "median_ms" in row and cell(row) in ours:
            row["ours_over_impl"] = row["median_ms"] / ours[cell(row)]["median_ms"]
            row["ours_over_impl_of_min"] = row["min_ms"] / ours[cell(row)]["min_ms"]
        for column, impl in (("over_twin", "fa_ops"), ("over_twin_cudnn", "sdpa_cudnn")):
            twin = speeds.get((twins.get(row["case"]), row["direction"], impl))
            if twin is not None and row["impl"] == "fa_ops" and "tflops" in row:
                row[column] = row["tflops"] / twin
        if "gb_per_s" in row and row["direction"] != "copy":
            row["share_of_h200"] = row["gb_per_s"] / H200_GB_PER_S
            if copied is not None:
                row["share_of_copy"] = row["gb_per_s"] / copied


def cell(row: Row) -> tuple[object, ...]:
    return tuple(row[column] for column in KEY)


def cut_off(time_limit: float) -> Row:
    """What a row says that was not begun, its time limit of so many seconds having passed."""
    return {"skipped": f"not run: the time limit of {time_limit:g} s had passed"}


def write_csv(rows: list[Row], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})


def table(rows: list[Row]) -> str:
    """Every timed row; those where fa_ops is slower than the row's implementation are marked with a `<`."""
    lines = [
        f"{'case':35} {'dtype':9} {'heads':>7} {'D':>4} {'direction':17} {'impl':19} "
        f"{'median ms':>10} {'min':>9} {'max':>9} {'TFLOP/s':>8} {'ours/impl':>9} {'of min':>6}"
    ]
    previous = None
    for row in rows:
        if cell(row) != previous:
            lines.append("")
            previous = cell(row)
        lines.append(table_line(row))
    return "\n".join(lines)


def table_line(row: Row) -> str:
    heads = f"{row['num_heads_q']}/{row['num_heads_kv']}"
    start = f"{row['case']:35} {row['dtype']:9} {heads:>7} {row['head_dim']:>4} {row['direction']:17} {row['impl']:19} "
    if "peak_extra_mib" in row:
        return start + f"{row['peak_extra_mib']:10.1f} MiB beyond inputs and outputs"
    if "median_ms" not in row:
        return start + str(row.get("error") or row["skipped"])[:120]
    digits = 4 if row["median_ms"] < 1 else 2
    times = f"{row['median_ms']:10.{digits}f} {row['min_ms']:9.{digits}f} {row['max_ms']:9.{digits}f}"
    tflops = f"{row['tflops']:8.3g}" if "tflops" in row else " " * 8
    if "gb_per_s" in row:
        tflops = f"{row['gb_per_s']:8.0f} GB/s"
    ratio = row.get("ours_over_impl")
    verdict = ""
    if ratio is not None:
        verdict = f"{ratio:9.2f} {row['ours_over_impl_of_min']:6.2f}{' <' if ratio < 1 else ''}"
    difference = f"  difference {row['difference']:.0e}" if "difference" in row else ""
    return f"{start}{times} {tflops} {verdict}{difference} {row.get('error', '')}".rstrip()


def twin_lines(rows: list[Row]) -> list[str]:
    """fa_ops on random lengths over fa_ops on equal lengths, in TFLOP/s."""
    return [
        f"fa_ops, {row['case']} ÷ its twin of equal lengths, {row['direction']}: {row['over_twin']:.3f}"
        for row in rows
        if "over_twin" in row
    ]


def bar_lines(rows: list[Row]) -> list[str]:
    """The project's bars, each with its worst measured figure."""
    bars: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for row in rows:
        for name, value, limit, is_floor in bars_of(row):
            met = value >= limit if is_floor else value <= limit
            bars[f"{name} {'>=' if is_floor else '<='} {limit:g}"].append((met, f"{value:.3g}"))
    return [
        f"{'met   ' if all(met for met, _ in results) else 'MISSED'} {name}: {', '.join(value for _, value in results)}"
        for name, results in bars.items()
    ]


def bars_of(row: Row) -> list[tuple[str, float, float, bool]]:
    """(name, value, limit, whether the limit is a floor) of each bar that this row answers."""
    ratio, on_cpu = row.get("ours_over_impl"), row["device"] == "cpu"
    if ratio is not None and row["impl"] in ("sdpa_loop", "sdpa_sum") and on_cpu and "tflops" in row:
        return [(f"CPU speed over {row['impl']}", ratio, 0.95, True)]
    if ratio is not None and row["impl"] == "sdpa_padded":
        return [("CPU speed over sdpa_padded", ratio, 2.5, True)]
    if row["impl"] != "fa_ops":
        return []
    if row.get("lengths") == "1 x 8192" and "peak_extra_mib" in row:
        return [("CPU peak memory beyond inputs and outputs, MB", row["peak_extra_mib"] * 2**20 / 1e6, 64, False)]
    if row["direction"] == "call_overhead" and "median_ms" in row and on_cpu:
        return [("CPU call overhead, µs", row["median_ms"] * 1e3, 150, False)]
    is_h200_bar = (
        "H200" in str(row["card"])
        and "tflops" in row
        and (row["dtype"], row["head_dim"], row["is_causal"]) == ("bfloat16", 128, True)
        and row["num_heads_q"] == row["num_heads_kv"]
        and str(row["lengths"]) in ("4 x 4096", "2 x 8192")
    )
    if not is_h200_bar:
        return []
    limit = {"forward": 350, "backward": 200}[str(row["direction"])]
    return [(f"H200 {row['direction']} TFLOP/s, D 128, causal, 4k-8k", row["tflops"], limit, True)]
