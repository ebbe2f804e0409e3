"""Skip-softmax (BLASST, arXiv 2512.12087): blocks whose scores lie far below the running maximum are left out.

λ of a phase is one number for each head, or what calibration found for the number of keys that a sequence has at that
call.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_ops.attention import attention
from fa_ops.reference import attention_reference
from fa_ops.sparsity.config import PHASES, FlashSkipSoftmaxConfig
from fa_ops.sparsity.counting import BlockCounts, count_dropped
from fa_ops.sparsity.curves import MOST_KNOTS, MOST_THRESHOLD, Calibrated
from fa_ops.sparsity.methods.base import DECODE, PREFILL, SparseAttentionMethod, register_sparse_method

DENSE, FIXED, CALIBRATED = range(3)


@register_sparse_method("flash_skip_softmax")
class FlashSkipSoftmax(SparseAttentionMethod):
    config_class: ClassVar[type] = FlashSkipSoftmaxConfig
    config: FlashSkipSoftmaxConfig

    def __init__(self, config: FlashSkipSoftmaxConfig, num_heads: int) -> None:
        super().__init__(config, num_heads)
        self.set_thresholds(config.thresholds)

    @property
    def name(self) -> str:
        return "flash_skip_softmax"

    def set_thresholds(self, thresholds: Mapping[str, Any]) -> None:
        config = replace(self.config, thresholds={**self.config.thresholds, **thresholds})
        for phase, values in config.thresholds.items():
            if len(values) not in (1, self.num_heads):
                raise ValueError(
                    f"thresholds[{phase!r}]: {len(values)} numbers given; accepted are 1 and {self.num_heads}"
                )
        self.config = config
        self.calibrated = {phase: given for phase, given in self.calibrated.items() if phase not in thresholds}
        self._changed()

    def set_calibrated(self, calibrated: Mapping[str, Calibrated]) -> None:
        self.calibrated = {**self.calibrated, **calibrated}
        self._changed()

    def _changed(self) -> None:
        """Compiled code is compiled again only where a phase changes its kind."""
        self.kinds = tuple(self._kind(phase) for phase in PHASES)
        self.refresh()

    def _kind(self, phase: str) -> int:
        if phase in self.calibrated:
            return CALIBRATED if self.calibrated[phase].target > 0 else DENSE
        return FIXED if phase in self.config.thresholds else DENSE

    def make_tensors(self, device: torch.device) -> dict[str, Tensor]:
        """fixed (2, Hq) float32: λ of phases that are not calibrated. line (2, 1 + 2 * MOST_KNOTS), float64, for it is
        steep: start, at and by of `Calibrated.bends` of those that are. What a phase does not have is 0."""
        fixed = [self._fixed(phase) for phase in PHASES]
        line = [self._line(phase) for phase in PHASES]
        return {
            "fixed": torch.tensor(fixed, dtype=torch.float32, device=device),
            "line": torch.tensor(line, dtype=torch.float64, device=device),
        }

    def _fixed(self, phase: str) -> list[float]:
        values = self.config.thresholds.get(phase, [0.0])
        return values if len(values) == self.num_heads else values * self.num_heads

    def _line(self, phase: str) -> list[float]:
        if phase not in self.calibrated:
            return [0.0] * (1 + 2 * MOST_KNOTS)
        start, *bends = self.calibrated[phase].bends()
        at, by = (row + [0.0] * (MOST_KNOTS - len(row)) for row in bends)
        return [start, *at, *by]

    def threshold(self, visible_keys: Tensor, is_decoding: bool, num_heads: int | None = None) -> Tensor | None:
        """λ (B, Hq) float32 of one call, of all heads or of the part of them that it has; None for a dense phase."""
        phase, num_heads = DECODE if is_decoding else PREFILL, num_heads or self.num_heads
        if self.kinds[phase] == DENSE:
            return None
        tensors = self.tensors_beside(visible_keys, num_heads)
        if self.kinds[phase] == CALIBRATED:
            start, at, by = tensors["line"][phase].split((1, MOST_KNOTS, MOST_KNOTS))
            log_keys = visible_keys.clamp(min=1)[:, None].to(torch.float64).log()
            log_threshold = start + ((log_keys - at).clamp(min=0) * by).sum(-1, keepdim=True)
            return log_threshold.exp().clamp(max=MOST_THRESHOLD).float().repeat(1, num_heads)
        if num_heads != self.num_heads and len(self.config.thresholds[PHASES[phase]]) > 1:
            raise ValueError(
                f"thresholds[{PHASES[phase]!r}]: one number for each of {self.num_heads} heads given; q has "
                f"{num_heads} of them, as under tensor parallelism, where one number for all is accepted"
            )
        return tensors["fixed"][phase, :num_heads].repeat(visible_keys.shape[0], 1)

    def apply_sparsity(
        self, q: Tensor, k: Tensor, v: Tensor, visible_keys: Tensor, is_decoding: bool, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        attend: Any = attention
        if self.config.backend == "pytorch":
            attend, arguments = attention_reference, {**arguments, "upcast": False}
        threshold = self.threshold(visible_keys, is_decoding, q.shape[-2])
        if threshold is None:
            return attend(q, k, v, **arguments), None
        result = attend(
            q, k, v, **arguments, skip_softmax_threshold=threshold,
            skip_softmax_block=(self.config.br, self.config.bc), return_skip_counts=self.collect_stats,
        )  # fmt: skip
        return result if self.collect_stats else (result, None)

    def calculate_sparsity(
        self, q: Tensor, k: Tensor, trials: tuple[float, ...], arguments: Mapping[str, Any]
    ) -> BlockCounts:
        return count_dropped(q, k, trials, (self.config.br, self.config.bc), **arguments)

    def get_threshold_info(self) -> dict[str, Any]:
        """For each phase None, {"thresholds": [λ]}, or {"a", "b", "target", "longest", "threshold"}, the last one λ at
        `longest` keys."""
        info: dict[str, Any] = {}
        for phase, kind in zip(PHASES, self.kinds, strict=True):
            if kind == DENSE:
                info[phase] = None
            elif kind == FIXED:
                info[phase] = {"thresholds": self.config.thresholds[phase]}
            else:
                own = self.calibrated[phase]
                info[phase] = {name: getattr(own, name) for name in ("a", "b", "target", "longest")}
                info[phase]["threshold"] = own.threshold(own.longest)
        return info
