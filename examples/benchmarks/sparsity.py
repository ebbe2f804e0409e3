"""Speed of skip-softmax: forward over the share of blocks dropped, beside dense attention of fa_ops and of SDPA.

    PYTHONPATH=. python examples/benchmarks/sparsity.py [--device cpu|cuda] [--output DIR] [--time-limit SECONDS]

The share is made by a λ on structured inputs (structured.py): λ is found by running the op and counting on the device,
for each wanted share. All implementations of a length are timed in turn. Writes DIR/sparsity-<device>.csv after each
length, and a plot of the speed over own dense attention; with FA_OPS_KERNEL=portable their names end in "-portable".
The exit status is 1 when fa_ops fails, when a peer differs from it, or when the λ that should drop nothing drops
something. README.md beside this says how figures are measured.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from cases import Case
from comparing import TOLERANCE, compare, error_text, has_run
from environment import describe, device_kind
from peers import PEERS, Data, packed_run
from plot import color
from report import Row, case_columns, cut_off, write_csv
from structured import structured_data
from timing import Clock, CpuClock, CudaClock, Run, interleave, summary
from torch import Tensor

import fa_ops
from fa_ops.kernels import tier
from fa_ops.sparsity.config import FlashSkipSoftmaxConfig

SHARES = (0.3, 0.5, 0.72, 0.8)
NOTHING = 1e-30  # a λ that drops nothing, at the full cost of looking
PEER_IMPLS = {"cuda": ("sdpa_cudnn", "sdpa_flash"), "cpu": ("sdpa_flash",)}
SEARCH_STEPS, SHARE_TOLERANCE = 14, 0.004
LN_RANGE = (-30.0, -1e-3)  # of λ that is searched
MAX_ROUNDS, SECONDS_PER_RUN = {"cuda": 20, "cpu": 3}, {"cuda": 0.6, "cpu": 0.1}
COLUMNS = (
    "case", "dtype", "num_heads_q", "num_heads_kv", "head_dim", "batch", "lengths", "is_causal", "br", "bc",
    "impl", "wanted", "threshold", "share", "median_ms", "min_ms", "max_ms", "samples", "tflops",
    "speed_over_dense", "speed_over_cudnn", "speed_over_flash", "difference", "error", "skipped",
    "tier", "device", "card", "clocks", "threads", "python", "torch", "triton", "cuda", "cudnn", "driver", "commit",
    "date",
)  # fmt: skip


def cases(device: str) -> list[Case]:
    """Grouped queries in bfloat16, D 128, causal; on a CPU a tiny one, to see the script work."""
    impls = ("fa_ops", *PEER_IMPLS[device])
    if device == "cpu":
        return [Case("1 x 512, causal", "float32", 4, 2, 32, (512,), True, impls)]
    sizes = ((4, 8192, 32), (1, 32768, 32), (1, 131072, 8))
    return [
        Case(f"{batch} x {length}, causal", "bfloat16", heads, heads // 4, 128, (length,) * batch, True, impls)
        for batch, length, heads in sizes
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    clock: Clock = CudaClock() if options.device == "cuda" else CpuClock()
    kernels = "-portable" if tier.TIER == "portable" else ""
    path = options.output / f"sparsity-{device_kind(options.device)}{kernels}"
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.time_limit
    rows: list[Row] = []
    for case in cases(options.device):
        print(case.name, file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            added = [case_columns(case) | cut_off(options.time_limit)]
        else:
            added = bench_case(case, options.device, clock, options.block)
        environment = describe(options.device) | {"tier": tier.TIER}
        rows += [row | environment for row in added]
        write_csv(rows, path.with_suffix(".csv"), COLUMNS)
    print(" | ".join(f"{name} {value}" for name, value in environment.items() if value))
    print(*map(line, rows), *conclusions(rows), sep="\n")
    try:
        plot(rows, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)
    return int(any("error" in row and (is_ours(row) or "difference" in row) for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    config = FlashSkipSoftmaxConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--block", type=int, nargs=2, default=(config.br, config.bc), metavar=("BR", "BC"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--time-limit", type=float, default=200, help="seconds after which no further length is begun")
    options = parser.parse_args(arguments)
    options.block = tuple(options.block)
    return options


def is_ours(row: Row) -> bool:
    return str(row.get("impl", "")).startswith("fa_ops")


def planned(case: Case, block: tuple[int, int]) -> dict[str, Row]:
    """The rows of a case before anything of it has run: dense attention, the peers, and each share."""
    columns = case_columns(case) | {"br": block[0], "bc": block[1]}
    rows = {impl: columns | {"impl": impl} for impl in case.impls}
    for wanted in (0.0, *SHARES):
        name = f"fa_ops, {wanted:.0%} dropped"
        rows[name] = columns | {"impl": name, "wanted": wanted}
    return rows


def bench_case(case: Case, device: str, clock: Clock, block: tuple[int, int]) -> list[Row]:
    """A row for dense attention, for each share and for each peer; one whose λ or call fails says so."""
    data = structured_data(case, device)
    rows = planned(case, block)
    runs: dict[str, Run] = {}
    for name, row in rows.items():
        try:
            if "wanted" not in row:
                runs[name] = PEERS[name](case, data)
                continue
            threshold, share = find_threshold(case, data, block, row["wanted"])
            if share < row["wanted"] - SHARE_TOLERANCE:
                row["skipped"] = f"no λ below 1 drops more than {share:.3f} of these inputs"
                continue
            row |= {"threshold": threshold, "share": share}
            runs[name] = skip_run(case, data, block, threshold)
        except Exception as error:
            row["error"] = error_text(error)
    for name, finding in compare(runs, "forward", TOLERANCE[case.dtype]).items():
        if rows[name].get("share", 0.0) > 0.0:
            finding.pop("error", None)  # dropping is meant to make a difference
            if rows[name]["wanted"] == 0.0:
                finding["error"] = f"λ {NOTHING:g} dropped a share of {rows[name]['share']:.2g}"
        rows[name] |= finding
        if not has_run(finding):
            del runs[name]
    for name, samples in interleave(
        runs, "forward", clock, MAX_ROUNDS[device], SECONDS_PER_RUN[device] * len(runs)
    ).items():
        figures = summary(samples)
        rows[name] |= figures | {"tflops": case.flops("forward") / figures["median_ms"] / 1e9}
    add_speeds(rows)
    return list(rows.values())


def skip_attention(
    case: Case, data: Data, block: tuple[int, int], threshold: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: bool
):
    return fa_ops.attention(
        q, k, v, data.starts, data.lengths, max(case.lengths), is_causal=case.is_causal,
        skip_softmax_threshold=threshold, skip_softmax_block=block, **options,
    )  # fmt: skip


def skip_run(case: Case, data: Data, block: tuple[int, int], threshold: float) -> Run:
    tensor = torch.tensor(threshold, device=data.q.device)
    return packed_run(partial(skip_attention, case, data, block, tensor), data)


@torch.no_grad()
def dropped_share(case: Case, data: Data, block: tuple[int, int], threshold: float) -> float:
    """Counted by the op itself."""
    tensor = torch.tensor(threshold, device=data.q.device)
    _, counts = skip_attention(case, data, block, tensor, data.q, data.k, data.v, return_skip_counts=True)
    visited, dropped = counts.sum((1, 2)).tolist()
    return dropped / visited


def find_threshold(case: Case, data: Data, block: tuple[int, int], wanted: float) -> tuple[float, float]:
    """λ and the share that it drops: by bisection the wanted one, and for 0 that of NOTHING."""
    share_of = partial(dropped_share, case, data, block)
    return (NOTHING, share_of(NOTHING)) if wanted == 0.0 else bisect_threshold(share_of, wanted)


def bisect_threshold(share_of: Callable[[float], float], wanted: float) -> tuple[float, float]:
    """λ and the share that it drops: the wanted one, or the largest that there is where that is less."""
    low, high = LN_RANGE
    largest = share_of(math.exp(high))
    if largest < wanted:
        return math.exp(high), largest
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        share = share_of(math.exp(middle))
        if abs(share - wanted) <= SHARE_TOLERANCE:
            break
        low, high = (middle, high) if share < wanted else (low, middle)
    return math.exp(middle), share


def add_speeds(rows: dict[str, Row]) -> None:
    """Speed of each row over own dense attention, over cuDNN's and over FlashAttention's, from medians."""
    for column, impl in (("dense", "fa_ops"), ("cudnn", "sdpa_cudnn"), ("flash", "sdpa_flash")):
        if "median_ms" in rows.get(impl, {}):
            for row in rows.values():
                if "median_ms" in row:
                    row[f"speed_over_{column}"] = rows[impl]["median_ms"] / row["median_ms"]


def line(row: Row) -> str:
    start = f"{row['case']:22} {row.get('impl', ''):22} "
    if "median_ms" not in row:
        return start + str(row.get("error") or row["skipped"])
    if "share" in row:
        start += f"λ {row['threshold']:<9.2g} {row['share']:6.1%}  "
    speeds = (f"{x} {row[f'speed_over_{x}']:.2f}" for x in ("dense", "cudnn", "flash") if f"speed_over_{x}" in row)
    figures = f"{row['median_ms']:9.3f} ms {row['tflops']:8.4g} TFLOP/s, speed over {', '.join(speeds)}"
    return f"{start:66}{figures} {row.get('error', '')}".rstrip()


def curve(rows: list[Row], case: str) -> list[tuple[float, float]]:
    """(share, speed over own dense attention), ascending shares."""
    own = [row for row in rows if row["case"] == case and "share" in row and "speed_over_dense" in row]
    return sorted((row["share"], row["speed_over_dense"]) for row in own)


def break_even(points: list[tuple[float, float]]) -> float | None:
    """The share from which skipping is no slower than dense, on lines between the points; None if there is none."""
    if not points or points[-1][1] < 1.0:
        return None
    for (share, speed), (next_share, next_speed) in reversed(list(pairwise(points))):
        if speed < 1.0:
            return share + (next_share - share) * (1.0 - speed) / (next_speed - speed)
    return points[0][0]


def conclusions(rows: list[Row]) -> list[str]:
    found = []
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        points = curve(rows, case)
        if points and points[0][0] == 0.0:
            share = break_even(points)
            where = "at none of the shares" if share is None else f"from a share of {share:.2f} on"
            overhead = 1.0 / points[0][1] - 1.0
            found.append(f"{case}: {overhead:+.1%} time when nothing is dropped; no slower than own dense {where}")
    return found


def plot(rows: list[Row], path: Path) -> None:
    """A panel for each length: speeds over own dense attention, and the bound of leaving out PV alone."""
    from matplotlib.figure import Figure

    names = [case for case in dict.fromkeys(str(row["case"]) for row in rows) if curve(rows, case)]
    if not names:
        print("no plot: nothing was timed", file=sys.stderr)
        return
    figure = Figure(figsize=(4.2 * len(names), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        shares = [step / 100 for step in range(91)]
        axes.plot(shares, [1 / (1 - share / 2) for share in shares], "k:", linewidth=1, label="bound, 1 / (1 − s / 2)")
        axes.plot(*zip(*curve(rows, name), strict=True), "o-", color=color("fa_ops"), label="fa_ops, skipping")
        axes.axhline(1.0, color=color("fa_ops"), linewidth=1, linestyle="--", label="fa_ops, dense")
        for row in rows:
            if row["case"] == name and not is_ours(row) and "speed_over_dense" in row:
                axes.axhline(row["speed_over_dense"], color=color(row["impl"]), linewidth=1, label=row["impl"])
        axes.set(title=name, xlabel="share of blocks dropped", ylabel="speed over fa_ops, dense")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.suptitle(f"{rows[0]['card']}, torch {rows[0]['torch']}, {rows[0]['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
