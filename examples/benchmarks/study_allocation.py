"""Which λ each head gets, so that a wanted share of all blocks is dropped: one λ, or better ones.

Everything here comes from dense passes and losses over training text. `counts` are those of `study_attention.Margins`,
(2, layers, Hq, grid + 1): blocks, and the attention that they get.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from study_attention import LN_GRID
from torch import Tensor

MOST_LN_THRESHOLD = -0.005  # λ < 1
SENSITIVITY_SHARES = (0.3, 0.5, 0.7, 0.9)
ATTENTION_STEP = 0.02


class Reach(NamedTuple):
    """Of a group of heads: its blocks, and at every ln λ of the grid the share of them and the attention dropped."""

    shares: np.ndarray
    attention: np.ndarray
    blocks: float

    @classmethod
    def of(cls, counts: Tensor, group: Tensor | None = None) -> "Reach":
        """Of the heads in a mask (layers, Hq), of all if None."""
        own = counts.flatten(1, 2) if group is None else counts[:, group]
        dropped, attention = own.sum(1).cumsum(-1).numpy()
        return cls(dropped[:-1] / max(dropped[-1], 1.0), attention[:-1], float(dropped[-1]))

    @property
    def largest(self) -> float:
        return float(np.interp(MOST_LN_THRESHOLD, LN_GRID, self.shares))

    def share(self, ln_threshold: float) -> float:
        return float(np.interp(ln_threshold, LN_GRID, self.shares))

    def attention_at(self, share: float) -> float:
        return float(np.interp(share, self.shares, self.attention))

    def ln_threshold(self, share: float) -> float:
        """ln λ of a share, that of the largest share for all above it."""
        first = max(int(np.searchsorted(self.shares, 0.0, side="right")) - 1, 0)  # the last that drops nothing
        found = float(np.interp(share, self.shares[first:], LN_GRID[first:]))
        return min(found, MOST_LN_THRESHOLD)


Groups = list[Tensor]  # masks (layers, Hq) bool, which together hold every head once
Losses = Callable[[Tensor], float]  # bits per byte on training text, of ln λ (layers, Hq)


def heads_of(counts: Tensor) -> tuple[int, int]:
    """(layers, Hq)"""
    return counts.shape[1], counts.shape[2]


def one_group(counts: Tensor) -> Groups:
    return [torch.ones(heads_of(counts), dtype=torch.bool)]


def by_layer(counts: Tensor) -> Groups:
    layers = torch.arange(counts.shape[1])[:, None].expand(heads_of(counts))
    return [layers == layer for layer in range(counts.shape[1])]


def by_head(counts: Tensor) -> Groups:
    numbers = torch.arange(math.prod(heads_of(counts))).view(heads_of(counts))
    return [numbers == number for number in range(numbers.numel())]


def ln_thresholds(counts: Tensor, groups: Groups, shares: list[float]) -> Tensor:
    """ln λ (layers, Hq): each group's λ drops its share of the group's blocks; a share of 0 is dense."""
    result = torch.full(heads_of(counts), -torch.inf)
    for group, share in zip(groups, shares, strict=True):
        if share > 0:
            result[group] = Reach.of(counts, group).ln_threshold(share)
    return result


def equal_shares(counts: Tensor, groups: Groups, wanted: float) -> list[float]:
    """The same share for each group, but that those which cannot reach it give what they can."""
    reaches = [Reach.of(counts, group) for group in groups]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        dropped = sum(min(middle, reach.largest) * reach.blocks for reach in reaches)
        low, high = (middle, high) if dropped < wanted * sum(reach.blocks for reach in reaches) else (low, middle)
    return [min(high, reach.largest) for reach in reaches]


class Sensitivity(NamedTuple):
    """Of one group: shares from 0 on, and what dropping them in this group alone costs, in any unit; convex."""

    shares: list[float]
    added: list[float]
    blocks: float

    @classmethod
    def of(cls, points: list[tuple[float, float]], blocks: float) -> "Sensitivity":
        """From (share, cost), ascending, the first (0, 0); the lower convex hull evens out their noise."""
        shares, added = zip(*convex_hull(points), strict=True)
        return cls(list(shares), list(added), blocks)


def attention_sensitivities(counts: Tensor, groups: Groups) -> list[Sensitivity]:
    """The cost is the attention that the dropped blocks would get: no pass but the dense one is needed."""
    found = []
    for group in groups:
        reach = Reach.of(counts, group)
        shares = sorted({min(step * ATTENTION_STEP, reach.largest) for step in range(1, int(1 / ATTENTION_STEP))})
        points = [(share, reach.attention_at(share)) for share in shares if share > 0]
        found.append(Sensitivity.of([(0.0, 0.0), *points], reach.blocks))
    return found


def loss_sensitivities(counts: Tensor, groups: Groups, loss: Losses) -> list[Sensitivity]:
    """The cost is the loss that is added: a loss is measured for each group and share."""
    dense = loss(torch.full(heads_of(counts), -torch.inf))
    found = []
    for group in groups:
        reach = Reach.of(counts, group)
        points = [(0.0, 0.0)]
        for share in sorted({min(share, reach.largest) for share in SENSITIVITY_SHARES} - {0.0}):
            threshold = torch.full(heads_of(counts), -torch.inf)
            threshold[group] = reach.ln_threshold(share)
            points.append((share, loss(threshold) - dense))
        found.append(Sensitivity.of(points, reach.blocks))
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
