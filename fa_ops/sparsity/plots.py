"""Pictures of a sparse model, as PNG files, one function each. They need matplotlib."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fa_ops.sparsity.attach import state_of
from fa_ops.sparsity.config import PHASES
from fa_ops.sparsity.stats import block_counts

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise ImportError('fa_ops.sparsity.plots needs matplotlib, of the extra "plot": pip install matplotlib') from error

DPI = 120
MOST_LABELLED_HEADS, MOST_LABELLED_LAYERS = 8, 32


def plot_dropped_shares(model: nn.Module, path: str | Path) -> None:
    """Share of blocks dropped by layer and head, prefill and decoding; ValueError if nothing was counted."""
    counts = torch.stack(list(block_counts(model).values())).double()  # (layers, phases, visited and dropped, heads)
    measured = [index for index in range(len(PHASES)) if counts[:, index, 0].sum() > 0]
    if not measured:
        raise ValueError("model: no blocks were counted; run it within collect_stats first")
    num_layers, num_heads = counts.shape[0], counts.shape[-1]
    figure = Figure(figsize=(1 + 4 * len(measured), 1.5 + max(1.5, 0.25 * num_layers)), layout="constrained")
    all_axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, index in zip(all_axes, measured, strict=True):
        visited, dropped = counts[:, index].unbind(1)
        shares = dropped / visited
        image = axes.imshow(shares.tolist(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set(title=f"{PHASES[index]}: {dropped.sum() / visited.sum():.1%} dropped", xlabel="head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        if num_heads <= MOST_LABELLED_HEADS and num_layers <= MOST_LABELLED_LAYERS:
            for layer, row in enumerate(shares.tolist()):
                for head, share in enumerate(row):
                    color = "black" if share > 0.5 else "white"
                    axes.text(head, layer, f"{share:.0%}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=all_axes, label="share dropped", format=PercentFormatter(1))
    figure.savefig(path, dpi=DPI)


def plot_calibration(model: nn.Module, path: str | Path) -> None:
    """λ against the share dropped: the points of each length, the fit, and what it takes for the target.

    Raises ValueError for a model that was not calibrated.
    """
    calibration = state_of(model).calibration
    if not calibration:
        raise ValueError("model: not calibrated since it was loaded; see calibrate")
    figure = Figure(figsize=(5 * len(calibration), 4), layout="constrained")
    for axes, (phase, own) in zip(
        figure.subplots(1, len(calibration), squeeze=False)[0], calibration.items(), strict=True
    ):
        target = own.fit.target
        for keys, shares in own.shares.items():
            (points,) = axes.plot(shares, own.trials, "o", markersize=3.5, label=f"{keys:.0f} keys, counted")
            color = points.get_color()
            line = [replace(own.fit, target=share).threshold(keys) for share in shares]
            axes.plot(shares, line, "-", color=color, linewidth=1, label=f"{keys:.0f} keys, fit")
            axes.plot(target, own.fit.threshold(keys), "o", markersize=9, color=color, fillstyle="none")
        axes.axvline(target, color="black", linewidth=0.8, linestyle="--", label=f"target {target:.0%}")
        axes.set(title=phase, xlabel="share of blocks dropped", ylabel="λ", yscale="log", xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=DPI)


def plot_quality(
    shares: Sequence[float],
    losses: Sequence[float],
    dense_loss: float,
    path: str | Path,
    *,
    unit: str = "nats per token",
) -> None:
    """Loss added to a dense model's against the share of blocks dropped, from the dense model on."""
    points = sorted([(0.0, 0.0), *((share, loss - dense_loss) for share, loss in zip(shares, losses, strict=True))])
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o-")
    axes.axhline(0, color="black", linewidth=0.8, label=f"dense: {dense_loss:.3f} {unit}")
    axes.set(title="quality against share", xlabel="share of blocks dropped", ylabel=f"loss added, {unit}", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DPI)
