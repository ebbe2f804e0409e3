"""The project's goals for speed, and which of them a run has reached: a table made of the rows of its CSV alone.

    python examples/benchmarks/goals.py results/CARD.csv      # writes the table of that run anew

A goal names the cell that answers it and what is to be reached there, first and then. It is judged only by figures of
one run; what has not been run is in the table with its reason.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import prefill
import sparsity
from cases import Case, cpu_cases, goal_cases, overhead_case
from decode import decode_cases
from report import KEY, Row, case_columns

ABSENT = "not run: no part of this run measures it"
ELSEWHERE = {"cpu": "--device cpu measures it, for goals-cpu.md", "cuda": "it needs a CUDA device"}
SETTING = ("date", "card", "clocks", "driver", "torch", "triton", "cudnn", "commit", "tier")


@dataclass(frozen=True)
class Figure:
    """A number that a goal is about: a column in the row of `impl`, and what it is to reach; None is not judged."""

    impl: str
    column: str
    first: float | None = None
    then: float | None = None
    text: str = "{:.3g}"
    derive: Callable[[float], float] = float
    is_floor: bool = True

    @property
    def is_judged(self) -> bool:
        return self.first is not None or self.then is not None

    def reaches(self, value: float, target: float | None) -> bool:
        return target is None or (value >= target if self.is_floor else value <= target)


@dataclass(frozen=True)
class Goal:
    number: int
    workload: str
    columns: Row  # of the cell that answers it
    figures: tuple[Figure, ...]
    device: str = "cuda"


OVER_CUDNN = partial(Figure, "sdpa_cudnn", "ours_over_impl")
TFLOPS = partial(Figure, "fa_ops", "tflops", text="{:.0f} TFLOP/s")


def goals(card: str) -> list[Goal]:
    """All goals, by number. A card that is no H200 is held to the share of what it copies itself."""
    found: list[Goal] = []

    def add(number: int, workload: str, case: Case, direction: str, *figures: Figure) -> None:
        found.append(Goal(number, workload, case_columns(case) | {"direction": direction}, figures))

    case = goal_cases()
    for mask, number, then in (("causal", 1, 680), ("full", 2, None)):
        for length in ("8k", "16k"):
            workload = f"forward D 128 {mask} {length} ÷ cuDNN"
            add(number, workload, case[f"{mask} {length}"], "forward", OVER_CUDNN(0.92, 1.0), TFLOPS(None, then))
    add(3, "forward D 64 full 16k ÷ cuDNN", case["D 64"], "forward", OVER_CUDNN(1.0, 1.3), TFLOPS())
    add(4, "forward D 256 causal 16k ÷ cuDNN", case["D 256"], "forward", OVER_CUDNN(0.9, 1.1), TFLOPS())
    for mask in ("causal", "full"):
        for kind, *targets in (("deterministic", 0.57, 0.7), ("the target of a fused one", 0.8, 1.0)):
            workload = f"backward D 128 {mask} 8k ÷ cuDNN, {kind}"
            add(5, workload, case[f"{mask} 8k"], "backward", OVER_CUDNN(*targets), TFLOPS())
    for kind, *targets in (("deterministic", 0.7, 0.85), ("the target of a fused one", 1.0, 1.2)):
        workload = f"backward D 128 causal, packed 1k–2k ÷ cuDNN at the same FLOPs, {kind}"
        add(6, workload, case["packed"], "backward", Figure("fa_ops", "over_twin_cudnn", *targets), TFLOPS())
    for name, direction in product(("packed", "wide"), ("forward", "backward")):
        workload = f"{direction} D 128 causal, {case[name].name.split(',')[0]} ÷ own equal lengths"
        add(7, workload, case[name], direction, Figure("fa_ops", "over_twin", 0.96, 0.99))
    found += decode_goals(card)
    found += skip_goals()
    for layout in prefill.LAYOUTS:
        columns = next(row for row in prefill.planned(layout) if row["direction"] == "prefill_attention")
        workload = f"attention time of {columns['case']} ÷ sdpa"
        found.append(Goal(12, workload, columns, (Figure("sdpa", "ours_over_impl", 1.7, 2.0, "{:.3g} ×"),)))
    portable = partial(Figure, "fa_ops_portable", "tflops", text="{:.0f} TFLOP/s")
    for mask in ("causal", "full"):
        start = f"portable kernel, D 128 {mask} 8k"
        add(13, f"{start}, forward", case[f"{mask} 8k"], "forward", portable(450, 520))
        add(13, f"{start}, deterministic backward", case[f"{mask} 8k"], "backward", portable(230, 300))
        add(13, f"{start}, backward, the target of a fused one", case[f"{mask} 8k"], "backward", portable(330, 420))
    for cpu_case, direction in product(cpu_cases(quick=False), ("forward", "forward_backward")):
        columns = case_columns(cpu_case) | {"direction": direction}
        workload = f"CPU {direction.replace('_', ' + ')}, {cpu_case.name}, {cpu_case.dtype} ÷ the sum of SDPA calls"
        found.append(Goal(14, workload, columns, (Figure("sdpa_sum", "ours_over_impl", 0.95, 1.0),), "cpu"))
    overhead = Figure("fa_ops", "median_ms", 60, 30, "{:.0f} µs", lambda ms: 1e3 * ms, is_floor=False)
    add(15, "host time of an eager forward under no_grad", overhead_case("cuda"), "call_overhead", overhead)
    return found


def decode_goals(card: str) -> list[Goal]:
    on_h200 = "H200" in card
    judged, shown = (0.85, 0.97), (None, None)
    figures = (
        Figure("fa_ops", "share_of_h200", *(judged if on_h200 else shown), text="{:.3g} of 4.3 TB/s"),
        Figure("fa_ops", "share_of_copy", *(shown if on_h200 else judged), text="{:.3g} of this card's copy"),
        Figure("fa_ops", "gb_per_s", text="{:.0f} GB/s"),
    )
    return [
        Goal(8, f"decode {case.columns['case']}, {case.num_heads_q}/{case.num_heads_kv} heads, D {case.head_dim}",
             case.columns, figures)
        for case in sorted(decode_cases(), key=lambda case: (case.page_size or 0, -case.num_heads_q, case.length))
    ]  # fmt: skip


def skip_goals() -> list[Goal]:
    def time_added(speed: float) -> float:
        return 100 * (1 / speed - 1)

    columns = {case.name: case_columns(case) | {"direction": "skip_softmax"} for case in sparsity.cases("cuda")}
    share = partial(Figure, column="share", text="at {:.0f} %", derive=lambda share: 100 * share)
    figures = {
        (9, "time added by skip-softmax, nothing dropped"): (
            Figure("fa_ops, 0% dropped", "speed_over_dense", 5, 2, "{:+.3g} %", time_added, is_floor=False),
        ),
        (10, "skip-softmax at 72 % ÷ own dense"): (
            Figure("fa_ops, 72% dropped", "speed_over_dense", 1.4, 1.55),
            share("fa_ops, 72% dropped"),
        ),
        (11, "skip-softmax at 50 % ÷ dense cuDNN"): (
            Figure("fa_ops, 50% dropped", "speed_over_cudnn", 1.15, 1.3),
            share("fa_ops, 50% dropped"),
        ),
    }
    return [
        Goal(number, f"{workload}, {name}", columns[name], judged)
        for (number, workload), judged in figures.items()
        for name in columns
    ]


def row_key(row: Row, impl: str) -> tuple[str, ...]:
    return (*(str(row[column]) for column in KEY), impl)


def measured(goal: Goal, rows: dict[tuple[str, ...], Row], device: str, absent: str) -> tuple[str, str]:
    """The cells of a goal's figures and of what is met: "no", "first" or "both", or "–" with a reason for none."""
    if goal.device != device:
        return f"not run: {ELSEWHERE[goal.device]}", "–"
    texts, verdicts = list[str](), list[tuple[bool, bool]]()
    ours = rows.get(row_key(goal.columns, "fa_ops"), {})
    for figure in goal.figures:
        row = rows.get(row_key(goal.columns, figure.impl), {"skipped": absent})
        error = row.get("error") or ours.get("error")
        if row.get(figure.column) in (None, ""):
            if figure.is_judged:
                reason = str(error or row.get("skipped") or f"{figure.column} is missing, see the CSV")
                return reason if reason.startswith("not run") else f"not run: {reason}", "–"
            continue
        value = figure.derive(float(row[figure.column]))
        texts.append(figure.text.format(value))
        if error and error not in texts:
            texts.append(str(error))
        verdicts.append(
            (figure.reaches(value, figure.first) and not error, figure.reaches(value, figure.then) and not error)
        )
    first, then = (all(reached) for reached in zip(*verdicts, strict=True))
    return ", ".join(texts), "both" if first and then else "first" if first else "no"


def targets(goal: Goal, name: str) -> str:
    texts = [
        f"{'' if figure.is_floor else '≤ '}{figure.text.format(target)}"
        for figure in goal.figures
        if (target := getattr(figure, name)) is not None
    ]
    return ", ".join(texts) or "–"


def markdown(rows: Sequence[Row], device: str, absent: str = ABSENT) -> str:
    """The table of all goals by the rows of one run. `absent` is the reason of those that have no row."""
    setting = rows[0] if rows else {}
    known = {row_key(row, str(row["impl"])): row for row in rows}
    lines, verdicts = list[str](), list[str]()
    for goal in goals(str(setting.get("card", ""))):
        figures, verdict = measured(goal, known, device, absent)
        verdicts.append(verdict)
        cells = (goal.number, goal.workload, targets(goal, "first"), targets(goal, "then"), figures, verdict)
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    counts = [f"{verdicts.count('both')} reach both bars", f"{verdicts.count('first')} the first alone"]
    counts += [f"{verdicts.count('no')} neither", f"{verdicts.count('–')} were not run"]
    return "\n".join([
        f"# Goals on {setting.get('card', 'no device')}",
        "",
        ", ".join(f"{name} {setting[name]}" for name in SETTING if setting.get(name)),
        "",
        f"Of {len(lines)} rows {', '.join(counts)}.",
        "",
        "Medians of one run, random data. A ratio is the speed of fa_ops over that of the other. `tier` is that of the",
        "kernels, FA_OPS_KERNEL. The goals are for an H200; in decoding another card is held to its own copies.",
        "",
        "| row | workload | first | then | measured | met? |",
        "|--:|---|--:|--:|---|---|",
        *lines,
        "",
    ])  # fmt: skip


def main(path: Path) -> None:
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    table = path.with_name(f"goals-{path.stem}.md")
    table.write_text(markdown(rows, str(rows[0]["device"])))
    print(f"wrote {table}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
