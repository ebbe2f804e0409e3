"""Which λ each head gets, so that a wanted share of all blocks is dropped: one λ, or better ones.

Everything here comes from dense passes and losses over training text. Heads are numbered by (layer, head); `counts` are
those of `study_attention.Margins`, (layers, Hq, grid + 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from study_attention import LN_GRID
from torch import Tensor

MOST_LN_THRESHOLD = -0.005  # λ < 1
SENSITIVITY_SHARES = (0.3, 0.5, 0.7, 0.9)


class Reach(NamedTuple):
    """Shares of a group of heads at every ln λ of the grid, and its blocks."""

    shares: np.ndarray
    blocks: int

    @classmethod
    def of(cls, counts: Tensor) -> "Reach":
        """counts (..., grid + 1), summed over all heads."""
        cumulative = counts.flatten(0, -2).sum(0).cumsum(0)
        blocks = int(cumulative[-1])
        return cls((cumulative[:-1].double() / max(blocks, 1)).numpy(), blocks)

    @property
    def largest(self) -> float:
        return float(np.interp(MOST_LN_THRESHOLD, LN_GRID, self.shares))

    def share(self, ln_threshold: float) -> float:
        return float(np.interp(ln_threshold, LN_GRID, self.shares))

    def ln_threshold(self, share: float) -> float:
        """ln λ of a share, that of the largest share for all above it."""
        first = max(int(np.searchsorted(self.shares, 0.0, side="right")) - 1, 0)  # the last that drops nothing
        found = float(np.interp(share, self.shares[first:], LN_GRID[first:]))
        return min(found, MOST_LN_THRESHOLD)


Groups = list[Tensor]  # masks (layers, Hq) bool, which together hold every head once
Losses = Callable[[Tensor], float]  # bits per byte on training text, of ln λ (layers, Hq)


def one_group(counts: Tensor) -> Groups:
    return [torch.ones(counts.shape[:2], dtype=torch.bool)]


def by_layer(counts: Tensor) -> Groups:
    return [torch.arange(counts.shape[0])[:, None].expand(counts.shape[:2]) == layer for layer in range(len(counts))]


def by_head(counts: Tensor) -> Groups:
    numbers = torch.arange(counts.shape[:2].numel()).view(counts.shape[:2])
    return [numbers == number for number in range(numbers.numel())]


def ln_thresholds(counts: Tensor, groups: Groups, shares: list[float]) -> Tensor:
    """ln λ (layers, Hq): each group's λ drops its share of the group's blocks; a share of 0 is dense."""
    result = torch.full(counts.shape[:2], -torch.inf)
    for group, share in zip(groups, shares, strict=True):
        if share > 0:
            result[group] = Reach.of(counts[group]).ln_threshold(share)
    return result


def equal_shares(counts: Tensor, groups: Groups, wanted: float) -> list[float]:
    """The same share for each group, but that those which cannot reach it give what they can."""
    reaches = [Reach.of(counts[group]) for group in groups]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        dropped = sum(min(middle, reach.largest) * reach.blocks for reach in reaches)
        low, high = (middle, high) if dropped < wanted * sum(reach.blocks for reach in reaches) else (low, middle)
    return [min(high, reach.largest) for reach in reaches]


class Sensitivity(NamedTuple):
    """Of one group: shares from 0 on, and the loss that dropping them in this group alone adds; convex."""

    shares: list[float]
    added: list[float]
    blocks: int


def measure_sensitivities(counts: Tensor, groups: Groups, loss: Losses) -> list[Sensitivity]:
    """One loss for each group and share; the lower convex hull of each group's points evens out their noise."""
    dense = loss(torch.full(counts.shape[:2], -torch.inf))
    found = []
    for group in groups:
        reach = Reach.of(counts[group])
        points = [(0.0, 0.0)]
        for share in sorted({min(share, reach.largest) for share in SENSITIVITY_SHARES}):
            threshold = torch.full(counts.shape[:2], -torch.inf)
            threshold[group] = reach.ln_threshold(share)
            points.append((share, loss(threshold) - dense))
        hull = convex_hull(points)
        found.append(Sensitivity([x for x, _ in hull], [y for _, y in hull], reach.blocks))
    return found


def convex_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower one, from the first to the last point; points ascend."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-2], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def cheapest_shares(sensitivities: list[Sensitivity], wanted: float) -> list[float]:
    """Shares of the groups, `wanted` of all blocks together, that add the least loss if losses add up.

    Along convex curves the cheapest is to take, again and again, the piece that costs the least for each block, until
    all marginal losses are alike.
    """
    pieces = sorted(
        (slope((x0, y0), (x1, y1)) / own.blocks, group, x1 - x0)
        for group, own in enumerate(sensitivities)
        for x0, x1, y0, y1 in zip(own.shares, own.shares[1:], own.added, own.added[1:], strict=False)
    )
    shares = [0.0] * len(sensitivities)
    left = wanted * sum(own.blocks for own in sensitivities)
    for _, group, width in pieces:
        blocks = sensitivities[group].blocks
        taken = min(width, left / blocks)
        shares[group] += taken
        left -= taken * blocks
    return shares
