"""Finds λ = a * exp(b * S) / L ** c, for a share S of dropped blocks and L visible keys, from dense attention.

One dense pass over a text counts what every trial λ would drop, in all heads of all modules. The counts of one length
are summed, so that a module weighs as much as it has blocks. log λ = log a + b S - c log L is then fitted, near the
target, since the curve is a line only in pieces; c is 1 where all lengths are alike. Where texts are given, a fit to
three quarters of them is checked on the others first.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.config import PHASES, CalibrationConfig
from fa_ops.sparsity.counting import BlockCounts
from fa_ops.sparsity.methods.base import DECODE, PREFILL, Calibrated, SparseAttentionMethod
from fa_ops.sparsity.texts import Texts, lengths_of, progress, run_window, token_windows, vocab_size_of

LEAST_POINTS = 3
LEAST_SHARE, MOST_SHARE = 0.1, 0.9
NEIGHBOURHOOD = 0.05  # of the target, in share, that the fit is made for
LEAST_RANGE = 1.5  # of the lengths that tell how λ depends on the length
LARGEST_ERROR, NOTABLE_ERROR = 0.1, 0.03
LENGTHS_PER_OCTAVE = 4
CHECKED_EVERY = 4


class CalibrationError(RuntimeError):
    """The figures do not give a calibration; the message says what to change."""


@dataclass
class LengthCounts:
    """Blocks of all modules at about one length: visited, dropped at each trial (trials,), and the sum of visited times
    log keys."""

    visited: float
    dropped: Tensor
    log_keys: float

    @property
    def keys(self) -> float:
        return math.exp(self.log_keys / self.visited)

    @property
    def shares(self) -> Tensor:
        return self.dropped / self.visited


@dataclass(frozen=True)
class PhaseCalibration:
    """A fit and what it was made from.

    Attributes:
        fit: a, b and target.
        trials: the λ that were counted.
        shares: by number of keys, the share that each λ drops.
        achieved: by number of keys, the share at the target's λ in the check.
    """

    fit: Calibrated
    trials: tuple[float, ...]
    shares: dict[float, list[float]]
    achieved: dict[float, float]


class CountRecorder:
    """Sums what the modules record, by phase, length, and whether it is kept for the check."""

    def __init__(self, trials: tuple[float, ...]) -> None:
        self.trials = trials
        self.prefill_keys: int | None = None  # of a text that is run in chunks
        self.is_check = False
        self._sums: dict[tuple[int, bool, int], LengthCounts] = {}

    def record(self, is_decoding: bool, visible_keys: Tensor, counts: BlockCounts) -> None:
        phase = DECODE if is_decoding else PREFILL
        visited, dropped = counts.visited.sum(-1).tolist(), counts.dropped.sum(-1).T.cpu().double()
        for own_visited, own_dropped, keys in zip(visited, dropped, visible_keys.tolist(), strict=True):
            if own_visited == 0:
                continue
            log_keys = math.log(self.prefill_keys if phase == PREFILL and self.prefill_keys else keys)
            key = (phase, self.is_check, round(log_keys / math.log(2) * LENGTHS_PER_OCTAVE))
            sums = self._sums.setdefault(key, LengthCounts(0, torch.zeros_like(own_dropped), 0.0))
            sums.visited += own_visited
            sums.dropped += own_dropped
            sums.log_keys += own_visited * log_keys

    def counts(self, phase: int, parts: tuple[bool, ...] = (False, True)) -> list[LengthCounts]:
        """Ascending lengths, of texts for the fit (False), for the check (True) or of both together."""
        merged: dict[int, LengthCounts] = {}
        for (own_phase, is_check, octave), sums in sorted(self._sums.items()):
            if own_phase == phase and is_check in parts:
                so_far = merged.get(octave, LengthCounts(0, torch.zeros_like(sums.dropped), 0.0))
                merged[octave] = LengthCounts(
                    so_far.visited + sums.visited, so_far.dropped + sums.dropped, so_far.log_keys + sums.log_keys
                )
        return [merged[octave] for octave in sorted(merged)]


def run_calibration(
    model: nn.Module, config: CalibrationConfig, forward_loop: Texts, tokenizer: Any
) -> dict[str, PhaseCalibration]:
    """Calibrates the enabled modules of a sparse model, and returns each phase's figures; see `apply.calibrate`."""
    methods = [method for method in sparse_methods(model).values() if method.is_enabled]
    if not methods:
        raise CalibrationError("calibration: all modules are disabled; enable some")
    recorder = CountRecorder(config.threshold_trials)
    with _recording(model, methods, recorder):
        if callable(forward_loop):
            forward_loop(model)
        else:
            _run_texts(model, config, forward_loop, tokenizer, recorder)
    result = {}
    for phase in PHASES:
        target = config.target_sparse_ratio[phase]
        if target > 0:
            result[phase] = _calibrate_phase(phase, target, config.threshold_trials, recorder)
    dense = {phase: Calibrated(1.0, 0.0, 0.0) for phase in PHASES}
    for method in methods:
        method.set_calibrated(dense | {phase: own.fit for phase, own in result.items()})
    return result


@contextmanager
def _recording(model: nn.Module, methods: Sequence[SparseAttentionMethod], recorder: CountRecorder) -> Iterator[None]:
    """The model in evaluation, its modules dense and recording; afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for method in methods:
            method.recorder = recorder
        with torch.no_grad():
            yield
    finally:
        for method in methods:
            method.recorder = None
        for module, was_training in training.items():
            module.training = was_training


def _run_texts(
    model: nn.Module, config: CalibrationConfig, texts: Any, tokenizer: Any, recorder: CountRecorder
) -> None:
    blocks = [(method.config.br, method.config.bc) for method in sparse_methods(model).values()]
    largest_br = max(br for br, _ in blocks)
    lengths = lengths_of(model, config, max(max(block) for block in blocks))
    windows = token_windows(texts, tokenizer, vocab_size_of(model), config, lengths)
    chunk_size = -(-config.chunk_size // largest_br) * largest_br
    for number, ids in enumerate(progress(windows, f"Calibrating at {', '.join(map(str, lengths))} tokens")):
        recorder.is_check = number // len(lengths) % CHECKED_EVERY == CHECKED_EVERY - 1
        recorder.prefill_keys = len(ids) - config.num_decode_tokens
        run_window(model, ids, config.num_decode_tokens, chunk_size)


def _calibrate_phase(phase: str, target: float, trials: tuple[float, ...], recorder: CountRecorder) -> PhaseCalibration:
    index = PHASES.index(phase)
    everything, check = recorder.counts(index), recorder.counts(index, (True,))
    fit = _fit(phase, target, trials, everything)
    checked_fit = _fit(phase, target, trials, recorder.counts(index, (False,))) if check else fit
    check = check or everything
    achieved = {counts.keys: _share_at(counts, trials, checked_fit.threshold(counts.keys)) for counts in check}
    _judge(phase, checked_fit, achieved, check)
    return PhaseCalibration(fit, trials, {counts.keys: counts.shares.tolist() for counts in everything}, achieved)


def _fit(phase: str, target: float, trials: tuple[float, ...], fitted: list[LengthCounts]) -> Calibrated:
    if not fitted:
        raise CalibrationError(
            f"calibration: no {phase} call was counted; set target_sparse_ratio[{phase!r}] to 0, or run some "
            "(decoding is calls of one query row, over a cache)"
        )
    shares = torch.stack([counts.shares for counts in fitted])
    reachable = float(shares[:, -1].max())
    if target > reachable:
        raise CalibrationError(
            f"target_sparse_ratio[{phase!r}]: {target} given; the largest share seen is {reachable:.3f}, at λ = "
            f"{trials[-1]}: lower the target, or use longer texts or smaller blocks (br, bc)"
        )
    is_used = (shares >= LEAST_SHARE) & (shares <= MOST_SHARE)
    if int(is_used.sum()) < LEAST_POINTS:
        raise CalibrationError(
            f"calibration: {int(is_used.sum())} of {is_used.numel()} points of {phase} drop {LEAST_SHARE:.0%} to "
            f"{MOST_SHARE:.0%}, {LEAST_POINTS} are needed: use longer texts, smaller blocks (br, bc) or more "
            "threshold_trials"
        )
    log_trials = torch.tensor(trials, dtype=torch.float64).log().expand_as(shares)
    log_keys = torch.tensor([[counts.keys] for counts in fitted], dtype=torch.float64).log().expand_as(shares)
    return _local_fit(shares[is_used], log_trials[is_used], log_keys[is_used], target)


def _local_fit(shares: Tensor, log_trials: Tensor, log_keys: Tensor, target: float) -> Calibrated:
    """Least squares of log λ = log a + b S - c log L, the points weighted by their nearness to the target."""
    weights = torch.softmax(-(((shares - target) / NEIGHBOURHOOD) ** 2) / 2, 0).sqrt()
    longest = float(log_keys.max())
    has_range = longest - float(log_keys.min()) > math.log(LEAST_RANGE)
    columns = [torch.ones_like(shares), shares, *([-log_keys] if has_range else [])]
    values = log_trials if has_range else log_trials + log_keys
    design = torch.stack(columns, 1) * weights[:, None]
    log_a, b, *power = (
        torch.linalg.lstsq(design, (values * weights)[:, None], driver="gelsd").solution.flatten().tolist()
    )
    return Calibrated(math.exp(log_a), b, target, power[0] if power else 1.0, math.exp(longest))


def _share_at(counts: LengthCounts, trials: tuple[float, ...], threshold: float) -> float:
    """The share that a λ drops: between two trials as the line between them."""
    shares = counts.shares.tolist()
    position = sum(trial <= threshold for trial in trials)
    if position in (0, len(trials)):
        return shares[max(position - 1, 0)]
    low, high = trials[position - 1], trials[position]
    part = math.log(threshold / low) / math.log(high / low)
    return shares[position - 1] + part * (shares[position] - shares[position - 1])


def _judge(phase: str, fit: Calibrated, achieved: dict[float, float], check: list[LengthCounts]) -> None:
    """Raises or warns where a length misses its target, or the most that it can drop."""
    wanted = {counts.keys: min(fit.target, float(counts.shares[-1])) for counts in check}
    keys = max(wanted, key=lambda length: abs(achieved[length] - wanted[length]))
    error = abs(achieved[keys] - wanted[keys])
    found = f"{phase} drops {achieved[keys]:.1%} at {keys:.0f} keys for a target of {fit.target:.1%}"
    if fit.b <= 0 or error > LARGEST_ERROR:
        raise CalibrationError(
            f"calibration: a poor fit: {found} (b = {fit.b:.3g}): use more samples, texts more like one another, or "
            "fewer lengths (num_length_bins)"
        )
    if error > NOTABLE_ERROR:
        warnings.warn(f"calibration: {found}; more samples may help", stacklevel=2)
    too_short = [f"{length:.0f}" for length, share in wanted.items() if share < fit.target - NOTABLE_ERROR]
    if too_short:
        warnings.warn(
            f"calibration: {phase} cannot drop {fit.target:.1%} at {', '.join(too_short)} keys; it drops what it can",
            stacklevel=2,
        )
