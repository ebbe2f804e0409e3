"""How the share that skip-softmax drops depends on λ and on the length.

At one λ, whether a key block is dropped depends by and large on how far it lies from the query block, and on that less
and less the farther it is. Taken as p - g / distance ** 1.25, it makes the blocks that a query block of x keys drops

    r(x) = p x + c + 4 g / x ** 0.25.

(Exponents from 1 to 1.5 were tried on two trained models, to tell a length from a half, two thirds and a quarter of it;
this one misses least.)

A text's prefill is all its query blocks, and each is the last one of a shorter text: one length tells the share of
every shorter one, and r, fitted to its longer query blocks, that of longer ones. A decoding step is a query block by
itself, and so is every query block of attention that is not causal.

In decoding, blocks are compared with those of their own segment of keys. What a step drops falls where its keys fill a
segment and the next one begins, and from there on it grows as it did in the segment before: a line of the distance is
no guide across a segment's end. With a segment more a step drops as much more as steps with one segment more did
where both were counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Lengths at which the share is written down, as multiples of the longest one counted; between them log λ is a line of
# the logarithm of the length.
LENGTHS = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0, 5 / 4, 3 / 2, 2.0, 3.0, 4.0, 8.0, 16.0)
# Of decoding over more keys than a segment: at these parts of each of the first SEGMENTS, and JUMP keys into it.
SEGMENT_PARTS = (1 / 32, 3 / 32, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16, 1.0)
SEGMENTS = 8
JUMP = 16
MOST_KNOTS = SEGMENTS * (1 + len(SEGMENT_PARTS)) + len(LENGTHS)
CELLS = 16  # of a segment: what was counted in each is taken together
LEAST_ROWS = 8  # lengths of query blocks that a fit to r needs
FITTED_FROM = 1 / 8  # of the longest
SLOPE_STEP = 0.05  # of the share, over which its effect on log λ is taken

# Short sequences may have no λ below 1 that reaches a target; with this one they come as near as they can.
MOST_THRESHOLD = 0.99


@dataclass(frozen=True)
class ShareCurve:
    """Shares of the visited blocks that each of some λ drops, by the number of keys.

    Attributes:
        trials: λ, ascending.
        keys: ascending lengths.
        shares: for each length one for each of the trials, not falling.
        longest: length up to which they were counted; those of longer ones are extrapolated.
    """

    trials: tuple[float, ...]
    keys: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    longest: float

    def at(self, keys: float) -> list[float]:
        """The shares of another length."""
        position = min(max(sum(own <= keys for own in self.keys), 1), len(self.keys) - 1)
        if len(self.keys) == 1:
            return list(self.shares[0])
        low, high = (math.log(own) for own in self.keys[position - 1 : position + 1])
        part = min(max((math.log(keys) - low) / (high - low), 0.0), 1.0)
        return [s + part * (t - s) for s, t in zip(*self.shares[position - 1 : position + 1], strict=True)]

    def log_threshold(self, target: float, shares: Sequence[float]) -> float:
        """ln λ for a share of blocks where the trials drop `shares`; MOST_THRESHOLD's where none drops enough."""
        logs = [math.log(trial) for trial in self.trials]
        position = sum(share < target for share in shares)
        if position == len(shares):
            return math.log(MOST_THRESHOLD)
        if position == 0:
            return logs[0]
        part = (target - shares[position - 1]) / (shares[position] - shares[position - 1])
        return logs[position - 1] + part * (logs[position] - logs[position - 1])


@dataclass(frozen=True)
class Calibrated:
    """λ of a phase for a target share and a number of keys, no more than MOST_THRESHOLD; a target of 0 is dense.

    Without a curve λ = a * exp(b * target) / keys. With one, a and b are its tangent: that formula's λ is the curve's
    at the target and the longest counted length, and changes with the target as that does.
    """

    a: float
    b: float
    target: float
    curve: ShareCurve | None = None

    @classmethod
    def of(cls, curve: ShareCurve, target: float) -> "Calibrated":
        shares = curve.at(curve.longest)
        low, high = (min(max(target + step, shares[0]), shares[-1]) for step in (-SLOPE_STEP, SLOPE_STEP))
        rise = curve.log_threshold(high, shares) - curve.log_threshold(low, shares)
        b = rise / (high - low) if high > low else 0.0
        log_scale = curve.log_threshold(target, shares) + math.log(curve.longest)
        return cls(math.exp(log_scale - b * target), b, target, curve)

    def with_target(self, target: float) -> "Calibrated":
        return replace(self, target=target) if self.curve is None else Calibrated.of(self.curve, target)

    @property
    def longest(self) -> float:
        """Keys up to which it was counted; 1 where that is not known."""
        return 1.0 if self.curve is None else self.curve.longest

    @property
    def largest_share(self) -> float:
        """Of the counted ones; 1 where none is known."""
        return 1.0 if self.curve is None else self.curve.at(self.curve.longest)[-1]

    def bends(self) -> tuple[float, list[float], list[float]]:
        """(start, at, by): ln λ = start + sum of by * max(ln keys - at, 0), at most MOST_KNOTS of them."""
        if self.curve is None:
            return math.log(self.a) + self.b * self.target, [0.0], [-1.0]
        x = [math.log(keys) for keys in self.curve.keys]
        y = [self.curve.log_threshold(self.target, shares) for shares in self.curve.shares]
        slopes = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)] or [-1.0]
        by = [slopes[0], *(after - before for before, after in pairwise(slopes))]
        return y[0] - slopes[0] * x[0], [0.0, *x[1:-1]], by

    def threshold(self, keys: float) -> float:
        start, at, by = self.bends()
        log_keys = math.log(keys)
        line = start + sum(bend * max(log_keys - knot, 0.0) for knot, bend in zip(at, by, strict=True))
        return min(math.exp(min(line, 0.0)), MOST_THRESHOLD)


class RowMeans(NamedTuple):
    """Means over query blocks of about the same number of keys, float64, that number ascending.

    Attributes:
        keys: (n,).
        weight: (n,), how many query blocks.
        blocks: (n, 1 + trials), key blocks visited, and dropped by each trial.
    """

    keys: Tensor
    weight: Tensor
    blocks: Tensor

    def at(self, keys: Tensor) -> Tensor:
        """(m, 1 + trials) of other lengths (m,): between those counted a line; behind the longest the fit to r, or with
        too few for one the last line."""
        if len(self.keys) == 1:
            return self.blocks * (keys / self.keys)[:, None]
        above = torch.searchsorted(self.keys, keys).clamp(1, len(self.keys) - 1)
        low, high = self.keys[above - 1], self.keys[above]
        part = ((keys - low) / (high - low))[:, None]
        blocks = self.blocks[above - 1] + part * (self.blocks[above] - self.blocks[above - 1])
        is_longer = keys > self.keys[-1]
        if is_longer.any() and len(self.keys) >= LEAST_ROWS:
            blocks[is_longer] = _terms(keys[is_longer]) @ self._fit()
        return _ordered(blocks)

    def are_in_segments(self, segment: int) -> bool:
        """Whether rows were counted in each of several segments."""
        number = _segment_of(self.keys, segment)
        return len(self.keys) >= LEAST_ROWS and int(number[-1]) > 0 and len(number.unique()) == int(number[-1]) + 1

    def in_segments(self, keys: Tensor, segment: int) -> Tensor:
        """As `at`, of decoding steps, where `are_in_segments`."""
        cells = self._pooled(segment // CELLS)
        end = float(self.keys[-1])
        if -end % segment < segment / CELLS:  # the last segment is full, but for a cell
            end = math.ceil(end / segment) * segment
        recent = cells.keys[cells.keys > max(segment, end - segment)]
        weight = cells.weight[-len(recent) :, None]
        growth = cells._within(recent, segment) - cells._within(recent - segment, segment)
        growth = (growth * weight).sum(0) / weight.sum()
        further = ((keys - end) / segment).ceil().clamp(min=0)
        return _ordered(cells._within(keys - further * segment, segment) + further[:, None] * growth)

    def _pooled(self, cell: int) -> "RowMeans":
        _, index = _segment_of(self.keys, cell).unique(return_inverse=True)
        sums = torch.cat([torch.ones_like(self.keys)[:, None], self.keys[:, None], self.blocks], 1)
        sums = sums.new_zeros(int(index[-1]) + 1, sums.shape[1]).index_add_(0, index, sums * self.weight[:, None])
        weight = sums[:, :1]
        return RowMeans(sums[:, 1] / weight[:, 0], weight[:, 0], sums[:, 2:] / weight)

    def _within(self, keys: Tensor, segment: int) -> Tensor:
        """Lines between those counted in the same segment, and beyond them on to its ends."""
        blocks = self.blocks.new_empty(len(keys), self.blocks.shape[1])
        own, asked = _segment_of(self.keys, segment), _segment_of(keys, segment)
        for number in asked.unique():
            is_own, is_asked = own == number, asked == number
            x, y = self.keys[is_own], self.blocks[is_own]
            if len(x) == 1:
                blocks[is_asked] = y
                continue
            above = torch.searchsorted(x, keys[is_asked]).clamp(1, len(x) - 1)
            part = (keys[is_asked] - x[above - 1]) / (x[above] - x[above - 1])
            blocks[is_asked] = y[above - 1] + part[:, None] * (y[above] - y[above - 1])
        return blocks

    def _fit(self) -> Tensor:
        """(3, 1 + trials), of the `_terms`."""
        is_used = self.keys >= self.keys[-1] * FITTED_FROM
        weight = (self.weight[is_used].sqrt() * self.keys[is_used])[:, None]
        return torch.linalg.lstsq(_terms(self.keys[is_used]) * weight, self.blocks[is_used] * weight).solution


def _terms(keys: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(keys), keys**-0.25, keys], 1)


def _ordered(blocks: Tensor) -> Tensor:
    """Without what a line draws beyond what can be: a larger λ drops no less, and none more than is visited."""
    visited = blocks[:, :1].clamp(min=0)
    return torch.cat([visited, torch.minimum(blocks[:, 1:].clamp(min=0).cummax(1).values, visited)], 1)


def _segment_of(keys: Tensor, segment: int) -> Tensor:
    """The number of the segment that the last of so many keys lies in."""
    return ((keys - 1) // segment).long()


def _segment_lengths(longest: float, segment: int) -> Tensor:
    """Lengths at which the share of decoding steps is written down."""
    of_each = [JUMP, *(part * segment for part in SEGMENT_PARTS)]
    first = [number * segment + keys for number in range(SEGMENTS) for keys in of_each]
    # further on a segment more makes less of a difference: the middle of one stands for all of it
    behind = [(longest * part // segment + 0.5) * segment for part in LENGTHS]
    return torch.tensor([*first, *(keys for keys in behind if keys > first[-1])], dtype=torch.float64)


def share_curve(means: RowMeans, trials: tuple[float, ...], unit: int | None, segment: int | None = None) -> ShareCurve:
    """The shares of whole calls: of their query blocks that end at every `unit` keys, or of one alone if it is None.

    With fewer lengths than a fit needs, the curve has just these. segment: of keys, in decoding.
    """
    longest = float(means.keys[-1])
    if unit is not None:
        longest = math.ceil(longest / unit) * unit
    lengths = torch.tensor(LENGTHS, dtype=torch.float64) * longest
    if len(means.keys) < LEAST_ROWS:
        lengths = means.keys
    if segment is not None and means.are_in_segments(segment):
        lengths = _segment_lengths(longest, segment)
        blocks = means.in_segments(lengths, segment)
    elif unit is None:
        blocks = means.at(lengths)
    else:
        count = (lengths / unit).round().long().clamp(min=1).unique()
        lengths = count.double() * unit
        every = torch.arange(1, int(count[-1]) + 1, dtype=torch.float64) * unit
        blocks = means.at(every).cumsum(0)[count - 1]
    shares = blocks[:, 1:] / blocks[:, :1].clamp(min=1e-9)
    return ShareCurve(
        trials,
        tuple(lengths.tolist()),
        tuple(tuple(round(share, 5) for share in row) for row in shares.tolist()),
        longest,
    )
