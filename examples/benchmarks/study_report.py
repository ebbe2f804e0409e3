"""The sparsity study's report: a plot and tables, made from its CSV alone.

python examples/benchmarks/study_report.py results/sparsity-study.csv
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

from report import Row

Rows = list[Row]
VERDICTS = ("better", "worse", "open")
ABOUT = ("date", "card", "torch", "transformers", "commit")


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return [{name: _number(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _number(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value


def write_report(path: Path) -> None:
    """Beside the CSV: a Markdown file, and a PNG where matplotlib is installed."""
    rows = read(path)
    picture = []
    try:
        if any("wanted" in row for row in rows):
            plot(rows, path.with_suffix(".png"))
            picture = [f"![loss over the share of dropped blocks]({path.with_suffix('.png').name})", ""]
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)
    path.with_suffix(".md").write_text("\n".join([*heading(rows), *picture, *tables(rows)]) + "\n")


def block(row: Row) -> str:
    return f"{row['br']:.0f} × {row['bc']:.0f}"


def in_use(rows: Rows) -> Row:
    """The first row of a phase: its order and block are those that all else is compared with."""
    return rows[0]


def heading(rows: Rows) -> list[str]:
    row = rows[0]
    dense = next(row["bits_per_byte"] for row in rows if row["allocation"] == "dense")
    lines = [
        "# Skip-softmax: loss over the share of blocks dropped",
        "",
        "Written by `study_report.py` from the CSV of the same name.",
        "",
        ", ".join(f"{name} {row[name]}" for name in ABOUT if row.get(name)),
        "",
        f"{row['model']}, {row['parameters'] / 1e6:.1f} million parameters, {row['layers']:.0f} layers of "
        f"{row['heads']:.0f} heads; {row['windows']:.0f} held-out windows of {row['context']:.0f} tokens, together "
        f"{row['bytes'] / 1e3:.0f} kB; λ found on {row['calibration_windows']:.0f} windows of training text. "
        f"Dense: {dense:.4f} bits per byte. In brackets behind a loss: the share that was really dropped. Intervals "
        "(95 %) are from a bootstrap over the held-out windows.",
        "",
    ]
    if "training" in row:
        lines += [f"The study trained it itself: {row['training']}.", ""]
    checks = [
        f"- Check, {op['phase']}, {block(op)}, λ {op['threshold']:g}, first window: {op['share']:.4f} dropped and "
        f"{op['bits_per_byte']:.5g} bits per token through the op, {study['share']:.4f} and "
        f"{study['bits_per_byte']:.5g} through the study's attention."
        for op, study in zip(_of(rows, "op"), _of(rows, "study"), strict=True)
    ]
    return [*lines, *dict.fromkeys(checks), ""]


def tables(rows: Rows) -> list[str]:
    lines = []
    for phase in dict.fromkeys(row["phase"] for row in rows if "phase" in row):
        own = [row for row in rows if row.get("phase") == phase]
        first = in_use(own)
        order, size = first["order"], block(first)
        lines += [f"## {phase.capitalize()}", ""]
        lines += [f"Loss added, bits per byte, by visiting order; blocks of {size}, one λ:", ""]
        lines += by_share([row for row in own if block(row) == size], ("uniform",), lambda row: row["order"])
        lines += compared(own, "uniform", title=f"Difference from {order} at the same share:")
        lines += [f"By block size; {order}, one λ:", ""]
        lines += by_share([row for row in own if row["order"] == order], ("uniform",), block)
        lines += allocations([row for row in own if block(row) == size], order, size)
        lines += [f"At a given λ: share dropped, and loss added; blocks of {size}:", ""]
        lines += by_threshold([row for row in own if block(row) == size], lambda row: row["order"])
        lines += [f"The same by block size; {order}:", ""]
        lines += by_threshold([row for row in own if row["order"] == order], block)
        lines += ["What λ would drop of dense attention, counted on the training text:", "", *counted(own)]
    skipped = dict.fromkeys(row["skipped"] for row in rows if str(row.get("skipped")).startswith("not run"))
    return lines + [f"- {reason}: {sum(row.get('skipped') == reason for row in rows)} rows" for reason in skipped]


def _of(rows: Rows, *allocations: str) -> Rows:
    return [row for row in rows if row["allocation"] in allocations]


def table(head: list[str], body: dict[str, list[str]]) -> list[str]:
    if not body:
        return ["Not measured.", ""]
    lines = [f"| {' | '.join(['', *head])} |", f"|---|{'---|' * len(head)}"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in body.items()), ""]


def by_share(rows: Rows, allocations: tuple[str, ...], name: Callable[[Row], str]) -> list[str]:
    rows = [row for row in _of(rows, *allocations) if "wanted" in row]
    shares = sorted({row["wanted"] for row in rows})
    body: dict[str, list[str]] = {}
    for row in rows:
        cells = body.setdefault(name(row), ["–"] * len(shares))
        if "share" in row:
            cells[shares.index(row["wanted"])] = f"{row['added']:+.4f} ({row['share']:.3f})"
    return table([f"{share:.0%}" for share in shares], body)


def compared(rows: Rows, *allocations: str, title: str = "Difference:") -> list[str]:
    """Differences from the base, which is measured at the same share, with intervals."""
    rows = [row for row in _of(rows, *allocations) if "versus_base" in row]
    if not rows:
        return []
    found, body = [title, ""], {}
    shares = sorted({row["wanted"] for row in rows})
    for row in rows:
        name = row["order"] if row["allocation"] == "uniform" else row["allocation"]
        if row["allocation"] == "uniform":
            name += f", {block(row)}"
        cells = body.setdefault(name, ["–"] * len(shares))
        interval = f"{row['versus_low']:+.4f} … {row['versus_high']:+.4f}"
        cells[shares.index(row["wanted"])] = f"{row['versus_base']:+.4f} ({interval}) {verdict(row)}"
    return [*found, *table([f"{share:.0%}" for share in shares], body)]


def by_threshold(rows: Rows, name: Callable[[Row], str]) -> list[str]:
    rows = [row for row in _of(rows, "fixed") if "share" in row]
    thresholds = sorted({row["threshold"] for row in rows})
    body: dict[str, list[str]] = {}
    for row in rows:
        cells = body.setdefault(name(row), ["–"] * len(thresholds))
        cells[thresholds.index(row["threshold"])] = f"{row['share']:.3f}, {row['added']:+.4f}"
    return table([f"λ {threshold:g}" for threshold in thresholds], body)


def allocations(rows: Rows, order: str, size: str) -> list[str]:
    """Tables for the order in use, and for the others how often an allocation beats one λ there."""
    own = [row for row in rows if row["order"] == order and "wanted" in row]
    names = [name for name in dict.fromkeys(row["allocation"] for row in own) if name != "uniform"]
    if not names:
        return []
    lines = [f"By allocation; {order}, blocks of {size}:", ""]
    lines += by_share(own, ("uniform", *names), lambda row: row["allocation"])
    lines += compared(own, *names, title="Difference from one λ at the same share:")
    others = [row for row in _of(rows, *names) if row["order"] != order and "versus_base" in row]
    if others:
        lines.append("In the other orders, of all shares:")
        for name in names:
            verdicts = [verdict(row) for row in others if row["allocation"] == name]
            lines.append(f"{name} {', '.join(f'{verdicts.count(v)} {v}' for v in VERDICTS)};")
        lines[-1] = lines[-1].replace(";", ".")
        lines.append("")
    return lines


def verdict(row: Row) -> str:
    """Of a loss less that of the base; open where the interval holds 0."""
    return "better" if row["versus_high"] < 0 else "worse" if row["versus_low"] > 0 else "open"


def counted(rows: Rows) -> list[str]:
    rows = _of(rows, "counted")
    thresholds = sorted({row["threshold"] for row in rows})
    body: dict[str, list[str]] = {}
    for row in rows:
        cells = body.setdefault(
            f"{row['order']}, {block(row)}", ["–"] * len(thresholds) + [f"{row['largest_share']:.3f}"]
        )
        cells[thresholds.index(row["threshold"])] = f"{row['share']:.3f}"
    return table([*(f"λ {threshold:g}" for threshold in thresholds), "λ → 1"], body)


def plot(rows: Rows, path: Path) -> None:
    """A line of panels for each phase: visiting orders, block sizes, allocations."""
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(row["phase"] for row in rows if "wanted" in row))
    figure = Figure(figsize=(13, 3.8 * len(phases)), layout="constrained")
    for line, phase in zip(figure.subplots(len(phases), 3, squeeze=False), phases, strict=True):
        own = [row for row in rows if row.get("phase") == phase and "wanted" in row]
        first = in_use(own)
        order, size = first["order"], block(first)
        uniform = _of(own, "uniform")
        panels = (
            (f"{phase}: visiting orders, {size}", [r for r in uniform if block(r) == size], lambda row: row["order"]),
            (f"block sizes, {order}", [r for r in uniform if r["order"] == order], block),
            (
                f"allocations, {order}, {size}",
                [r for r in own if (r["order"], block(r)) == (order, size)],
                lambda row: row["allocation"],
            ),
        )
        for axes, (title, panel, name) in zip(line, panels, strict=True):
            for label in dict.fromkeys(map(name, panel)):
                points = [row for row in panel if name(row) == label and "share" in row]
                points = [{"share": 0, "added": 0, "added_low": 0, "added_high": 0}, *points]
                points.sort(key=lambda row: row["share"])
                shares = [row["share"] for row in points]
                (curve,) = axes.plot(shares, [row["added"] for row in points], "o-", markersize=3, label=label)
                low, high = ([row[end] for row in points] for end in ("added_low", "added_high"))
                axes.fill_between(shares, low, high, alpha=0.12, color=curve.get_color())
            axes.set(title=title, xlabel="share of blocks dropped", ylabel="loss added, bits per byte")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
