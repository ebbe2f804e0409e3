"""The benchmark's plot: TFLOP/s over the sequence length on CUDA, TFLOP/s by case on CPU."""

from pathlib import Path

from cases import FLOP_FACTOR
from report import Row

COLORS = {
    "fa_ops": "#d62728",
    "fa_ops_portable": "#e6a8a8",
    "sdpa_cudnn": "#76b900",
    "sdpa_flash": "#1f77b4",
    "flex_attention": "#9467bd",
    "torch_varlen": "#ff7f0e",
    "sdpa_sum": "#1f77b4",
    "sdpa_loop": "#17becf",
    "sdpa_padded": "#7f7f7f",
}
OTHER_COLOR = "#8c564b"


def write_plot(rows: list[Row], path: Path, title: str) -> None:
    """Write a PNG of the rows that have a speed, one at least. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if is_drawn(row)]
    by_length = [row for row in timed if row["device"] == "cuda" and is_in_length_plot(row)]
    figure = length_panels(by_length, pyplot) if by_length else case_panels(timed, pyplot)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def length_panels(rows: list[Row], pyplot):
    """One panel per direction, mask and head dimension."""
    directions = sorted({str(row["direction"]) for row in rows}, reverse=True)
    columns = sorted({(row["head_dim"], not row["is_causal"]) for row in rows})
    size = (3.2 * len(columns), 3.2 * len(directions))
    figure, axes = pyplot.subplots(len(directions), len(columns), figsize=size, squeeze=False, layout="constrained")
    for line, direction in enumerate(directions):
        for column, (head_dim, is_full) in enumerate(columns):
            wanted = (direction, head_dim, not is_full)
            panel = [row for row in rows if (row["direction"], row["head_dim"], row["is_causal"]) == wanted]
            axis = axes[line][column]
            for impl in dict.fromkeys(str(row["impl"]) for row in panel):
                points = sorted((length_of(row), row["tflops"]) for row in panel if row["impl"] == impl)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color(impl), label=impl)
            axis.set_xscale("log", base=2)
            lengths = sorted({length_of(row) for row in panel})
            axis.set_xticks(lengths, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths], fontsize=8)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            mask = "full" if is_full else "causal"
            axis.set_title(f"{direction.replace('_', ' + ')}, D {head_dim}, {mask}", fontsize=9)
            axis.set_xlabel("sequence length", fontsize=8)
            axis.set_ylabel("TFLOP/s", fontsize=8)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def case_panels(rows: list[Row], pyplot):
    """One panel per direction, a group of bars per case; a black line spans the fastest and the slowest sample."""
    directions = list(dict.fromkeys(str(row["direction"]) for row in rows))
    impls = list(dict.fromkeys(str(row["impl"]) for row in rows))
    cases = list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))
    size = (6 * len(directions), 4)
    figure, axes = pyplot.subplots(1, len(directions), figsize=size, squeeze=False, layout="constrained")
    width = 0.8 / len(impls)
    for axis, direction in zip(axes[0], directions, strict=True):
        for offset, impl in enumerate(impls):
            bars = [row for row in rows if row["direction"] == direction and row["impl"] == impl]
            shift = (offset - (len(impls) - 1) / 2) * width
            places = [cases.index((row["case"], row["dtype"])) + shift for row in bars]
            heights = [row["tflops"] * 1e3 for row in bars]
            slowest = [h * (1 - row["median_ms"] / row["max_ms"]) for h, row in zip(heights, bars, strict=True)]
            fastest = [h * (row["median_ms"] / row["min_ms"] - 1) for h, row in zip(heights, bars, strict=True)]
            axis.bar(places, heights, width, yerr=(slowest, fastest), color=color(impl), label=impl)
        axis.set_xticks(range(len(cases)), [f"{name}\n{dtype}" for name, dtype in cases], fontsize=8)
        axis.set_ylabel("GFLOP/s")
        axis.set_title(direction.replace("_", " + "), fontsize=9)
    axes[0][0].legend(fontsize=8)
    return figure


def is_drawn(row: Row) -> bool:
    """Whether the row has a speed of dense attention."""
    return "tflops" in row and row["direction"] in FLOP_FACTOR


def is_in_length_plot(row: Row) -> bool:
    """Batches of 16k tokens in equal lengths, bf16, as many KV heads as heads; the rest would need axes of its own."""
    is_plain = row["dtype"] == "bfloat16" and row["num_heads_q"] == row["num_heads_kv"]
    return is_plain and str(row["lengths"]).split(" x ")[0] == str(16384 // length_of(row))


def length_of(row: Row) -> int:
    """The length of the sequences of a batch where all have the same, else that of the last."""
    return int(str(row["lengths"]).split()[-1])


def color(impl: str) -> str:
    return COLORS.get(impl, OTHER_COLOR)
