"""Pictures of a sparse model, as PNG files, one function each. They need matplotlib: pip install "fa_ops[plot]"."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from fa_ops.sparsity.attach import state_of
from fa_ops.sparsity.config import PHASES
from fa_ops.sparsity.stats import block_counts


def plot_dropped_shares(model: nn.Module, path: str | Path) -> None:
    """Share of blocks dropped by layer and head, prefill and decoding; ValueError if nothing was counted."""
    counts = torch.stack(list(block_counts(model).values())).double()  # (layers, phases, visited and dropped, heads)
    measured = [index for index in range(len(PHASES)) if counts[:, index, 0].sum() > 0]
    if not measured:
        raise ValueError("model: no blocks were counted; run it within collect_stats first")
    figure = Figure(figsize=(1 + 4 * len(measured), 1.5 + 0.3 * len(counts)), layout="constrained")
    all_axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, index in zip(all_axes, measured, strict=True):
        visited, dropped = counts[:, index].unbind(1)
        image = axes.imshow((dropped / visited).tolist(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set(title=f"{PHASES[index]}: {dropped.sum() / visited.sum():.1%} dropped", xlabel="head", ylabel="layer")
        axes.set_xticks(range(visited.shape[1]))
        axes.set_yticks(range(visited.shape[0]))
    figure.colorbar(image, ax=all_axes, label="share of visited blocks")
    figure.savefig(path, dpi=150)


def plot_calibration(model: nn.Module, path: str | Path) -> None:
    """λ against the share dropped, the points of each length and the fit; ValueError if not calibrated."""
    calibration = state_of(model).calibration
    if not calibration:
        raise ValueError("model: not calibrated since it was loaded; see calibrate")
    figure = Figure(figsize=(5 * len(calibration), 4), layout="constrained")
    for axes, (phase, own) in zip(
        figure.subplots(1, len(calibration), squeeze=False)[0], calibration.items(), strict=True
    ):
        for keys, shares in own.shares.items():
            (points,) = axes.plot(shares, own.trials, "o", markersize=3, label=f"{keys:.0f} keys")
            line = [replace(own.fit, target=share).threshold(keys) for share in shares]
            axes.plot(shares, line, "-", color=points.get_color(), linewidth=0.8)
        axes.axvline(own.fit.target, color="black", linewidth=0.8, linestyle="--", label=f"target {own.fit.target:.0%}")
        axes.set(title=phase, xlabel="share of blocks dropped", ylabel="λ", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_quality(
    shares: Sequence[float],
    losses: Sequence[float],
    dense_loss: float,
    path: str | Path,
    *,
    unit: str = "nats per token",
) -> None:
    """Loss added to a dense model's against the share of blocks dropped."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * share for share in shares], [loss - dense_loss for loss in losses], "o-")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Quality", xlabel="blocks dropped, %", ylabel=f"loss added, {unit}")
    figure.savefig(path, dpi=150)
