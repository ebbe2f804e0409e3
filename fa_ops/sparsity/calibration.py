"""Finds λ for a share of dropped blocks and a number of keys, from dense attention.

One dense pass over a text counts what every trial λ would drop, by query block, in all heads of all modules. Summed,
so that a module weighs as much as it has blocks, that is a curve for each phase (`fa_ops.sparsity.curves`): the share
by λ and length. Decoding is counted at rows of the same pass, which are what steps there would be. Where texts are
given, a curve of three quarters of them is checked on the others first.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_ops.integrations.huggingface_models import model_itself
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.config import PHASES, CalibrationConfig
from fa_ops.sparsity.counting import BlockCounts, single_rows
from fa_ops.sparsity.curves import Calibrated, RowMeans, ShareCurve, share_curve
from fa_ops.sparsity.methods.base import DECODE, PREFILL, SparseAttentionMethod
from fa_ops.sparsity.texts import Texts, lengths_of, progress, run_window, token_windows, vocab_size_of
from fa_ops_meta.skip import DECODE_SEGMENT

LEAST_POINTS = 3
LEAST_SHARE, MOST_SHARE = 0.1, 0.9
LARGEST_ERROR, NOTABLE_ERROR = 0.1, 0.03
CHECKED_EVERY = 4
SHOWN_LENGTHS = (0.5, 1.0)  # of the longest counted
STRETCHES = 4  # of a call, each with num_decode_tokens rows that decoding is counted at
GOLDEN = 0.6180339887  # its multiples spread evenly within 1, however many there are


class CalibrationError(RuntimeError):
    """The figures do not give a calibration; the message says what to change."""


@dataclass(frozen=True)
class PhaseCalibration:
    """A fit and what it was made from.

    Attributes:
        fit: the target and what gives λ for it.
        trials: the λ that were counted.
        shares: by number of keys, the share that each λ drops.
        achieved: by number of keys, the share at the target's λ in the check.
    """

    fit: Calibrated
    trials: tuple[float, ...]
    shares: dict[float, list[float]]
    achieved: dict[float, float]


class CountRecorder:
    """Sums what the modules record, by phase, whether it is kept for the check, and length.

    Of each prefill call, decoding is counted at `num_decode_rows` rows.
    """

    def __init__(self, trials: tuple[float, ...], unit: int, num_decode_rows: int) -> None:
        self.trials = trials
        self.unit = unit  # keys of a bin
        self.num_decode_rows = num_decode_rows
        self.is_check = False
        self.causal: set[bool] = set()  # what prefills were
        self._num_calls = 0
        # (bins, 3 + trials): query blocks, their keys, blocks visited and dropped
        self._sums: dict[tuple[int, bool], Tensor] = {}

    def record(
        self,
        method: SparseAttentionMethod,
        q: Tensor,
        k: Tensor,
        visible_keys: Tensor,
        is_decoding: bool,
        arguments: Mapping[str, Any],
    ) -> None:
        is_causal = arguments.get("is_causal", True) or arguments.get("window_size", (-1, -1))[1] == 0
        counts = method.calculate_sparsity(q, k, self.trials, arguments)
        self._add(DECODE if is_decoding else PREFILL, counts, visible_keys, is_causal)
        if is_decoding:
            return
        self.causal.add(is_causal)
        self._num_calls += 1
        if is_causal and self.num_decode_rows:
            shift = self._num_calls * GOLDEN % 1
            parts = (torch.arange(self.num_decode_rows, dtype=torch.float64) + shift) / self.num_decode_rows
            hidden = arguments["b_seq_len" if arguments.get("b_seq_len_k") is None else "b_seq_len_k"] - visible_keys
            for rows, its_k, its_arguments, sequence in single_rows(q, k, arguments, parts):
                counts = method.calculate_sparsity(rows, its_k, self.trials, its_arguments)
                self._add(DECODE, counts, its_arguments["b_seq_len_k"] - hidden[sequence], is_causal)

    def _add(self, phase: int, counts: BlockCounts, visible_keys: Tensor, is_causal: bool) -> None:
        keys = F.pad(visible_keys.long(), (0, 1))[counts.sequence] - (counts.rows_behind if is_causal else 0)
        table = torch.cat([keys[None], counts.visited.sum(0)[None], counts.dropped.sum(1)]).T.cpu().double()
        table = table[(table[:, 0] > 0) & (table[:, 1] > 0)]
        if not len(table):
            return
        heads = float(counts.visited.shape[0])
        rows = torch.cat([torch.full_like(table[:, :1], heads), table[:, :1] * heads, table[:, 1:]], 1)
        bins = ((table[:, 0] + self.unit - 1) // self.unit).long()
        sums = self._sums.get((phase, self.is_check), rows[:0])
        sums = F.pad(sums, (0, 0, 0, max(int(bins.max()) + 1 - len(sums), 0)))
        self._sums[phase, self.is_check] = sums.index_add_(0, bins, rows)

    def means(self, phase: int, parts: tuple[bool, ...] = (False, True)) -> RowMeans | None:
        """Of texts for the fit (False), for the check (True) or of both together; None if nothing was counted."""
        given = [self._sums[phase, part] for part in parts if (phase, part) in self._sums]
        if not given:
            return None
        size = max(map(len, given))
        sums = torch.stack([F.pad(own, (0, 0, 0, size - len(own))) for own in given]).sum(0)
        sums = sums[sums[:, 0] > 0]
        weight = sums[:, :1]
        return RowMeans(sums[:, 1] / sums[:, 0], sums[:, 0], sums[:, 2:] / weight)


def run_calibration(
    model: nn.Module, config: CalibrationConfig, forward_loop: Texts, tokenizer: Any
) -> dict[str, PhaseCalibration]:
    """Calibrates the enabled modules of a sparse model, and returns each phase's figures; see `apply.calibrate`."""
    methods = [method for method in sparse_methods(model).values() if method.is_enabled]
    if not methods:
        raise CalibrationError("calibration: all modules are disabled; enable some")
    targets = {phase: target for phase, target in config.target_sparse_ratio.items() if target > 0}
    unit = max(method.config.br for method in methods)
    num_decode_rows = STRETCHES * config.num_decode_tokens if "decode" in targets else 0
    recorder = CountRecorder(config.threshold_trials, unit, num_decode_rows)
    with _recording(model, methods, recorder):
        if callable(forward_loop):
            forward_loop(model)
        else:
            _run_texts(model_itself(model), config, forward_loop, tokenizer, recorder)
    result = {phase: _calibrate_phase(phase, target, recorder) for phase, target in targets.items()}
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
    lengths = lengths_of(model, config, max(max(block) for block in blocks))
    windows = token_windows(texts, tokenizer, vocab_size_of(model), config, lengths)
    chunk_size = -(-config.chunk_size // recorder.unit) * recorder.unit
    for number, ids in enumerate(progress(windows, f"Calibrating at {', '.join(map(str, lengths))} tokens")):
        recorder.is_check = number // len(lengths) % CHECKED_EVERY == CHECKED_EVERY - 1
        run_window(model, ids, chunk_size)


def _calibrate_phase(phase: str, target: float, recorder: CountRecorder) -> PhaseCalibration:
    curve = _curve(phase, recorder, (False, True))
    if curve is None:
        raise CalibrationError(
            f"calibration: no {phase} call was counted; set target_sparse_ratio[{phase!r}] to 0, or run some "
            "(decoding is counted at rows of causal prefills, and at calls of one query row)"
        )
    _refuse_unreachable(phase, target, curve)
    _refuse_too_few(phase, curve)
    part, check = _curve(phase, recorder, (False,)), _curve(phase, recorder, (True,))
    checked_fit = Calibrated.of(part or curve, target)
    check = check or curve
    achieved, wanted = {}, {}
    for length in SHOWN_LENGTHS:
        keys = curve.longest * length
        achieved[keys] = _share_at(check.at(keys), check.trials, checked_fit.threshold(keys))
        wanted[keys] = min(target, check.at(keys)[-1])
    _judge(phase, target, achieved, wanted)
    shares = {curve.longest * length: curve.at(curve.longest * length) for length in SHOWN_LENGTHS}
    return PhaseCalibration(Calibrated.of(curve, target), curve.trials, shares, achieved)


def _curve(phase: str, recorder: CountRecorder, parts: tuple[bool, ...]) -> ShareCurve | None:
    index = PHASES.index(phase)
    means = recorder.means(index, parts)
    if means is None:
        return None
    if index == PREFILL and len(recorder.causal) > 1:
        raise CalibrationError(
            "calibration: some modules are causal and others are not; calibrate them apart, by disabling the others"
        )
    is_whole = index == PREFILL and recorder.causal == {True}
    unit, segment = recorder.unit if is_whole else None, DECODE_SEGMENT if index == DECODE else None
    return share_curve(means, recorder.trials, unit, segment)


def _refuse_unreachable(phase: str, target: float, curve: ShareCurve) -> None:
    reached = {keys: curve.at(keys)[-1] for keys in (curve.longest * length for length in reversed(SHOWN_LENGTHS))}
    if target <= reached[curve.longest]:
        return
    by_length = ", ".join(f"{share:.3f} at {keys:.0f} keys" for keys, share in reached.items())
    longer = [keys for keys, shares in zip(curve.keys, curve.shares, strict=True) if shares[-1] >= target]
    hint = f" (of about {longer[0]:.0f} tokens)" if longer else ""
    raise CalibrationError(
        f"target_sparse_ratio[{phase!r}]: {target} given; the largest share seen, at λ = {curve.trials[-1]}, is "
        f"{by_length}: lower the target, or use longer texts{hint} or smaller blocks (br, bc)"
    )


def _refuse_too_few(phase: str, curve: ShareCurve) -> None:
    shares = curve.at(curve.longest)
    number = sum(LEAST_SHARE <= share <= MOST_SHARE for share in shares)
    if number < LEAST_POINTS:
        raise CalibrationError(
            f"calibration: {number} of {len(shares)} points of {phase} drop {LEAST_SHARE:.0%} to {MOST_SHARE:.0%}, "
            f"{LEAST_POINTS} are needed: use longer texts, smaller blocks (br, bc) or more threshold_trials"
        )


def _share_at(shares: Sequence[float], trials: Sequence[float], threshold: float) -> float:
    """The share that a λ drops: between two trials as the line between them."""
    x, y = torch.tensor(trials, dtype=torch.float64).log(), torch.tensor(shares, dtype=torch.float64)
    above = int(torch.searchsorted(x, x.new_tensor(threshold).log()).clamp(1, len(x) - 1))
    part = (x.new_tensor(threshold).log() - x[above - 1]) / (x[above] - x[above - 1])
    return float(y[above - 1] + part.clamp(0, 1) * (y[above] - y[above - 1]))


def _judge(phase: str, target: float, achieved: dict[float, float], wanted: dict[float, float]) -> None:
    """Raises or warns where a length misses its target, or the most that it can drop."""
    keys = max(wanted, key=lambda length: abs(achieved[length] - wanted[length]))
    error = abs(achieved[keys] - wanted[keys])
    found = f"{phase} drops {achieved[keys]:.1%} at {keys:.0f} keys of texts held back, for a target of {target:.1%}"
    if error > LARGEST_ERROR:
        raise CalibrationError(f"calibration: a poor fit: {found}: use more samples, or texts more like one another")
    if error > NOTABLE_ERROR:
        warnings.warn(f"calibration: {found}; more samples may help", stacklevel=2)
    too_short = [f"{length:.0f}" for length, share in wanted.items() if share < target - NOTABLE_ERROR]
    if too_short:
        warnings.warn(
            f"calibration: {phase} cannot drop {target:.1%} at {', '.join(too_short)} keys; it drops what it can",
            stacklevel=2,
        )
