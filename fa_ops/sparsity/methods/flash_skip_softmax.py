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
    fixed: Tensor  # (2, Hq) float32: λ of phases that are not calibrated
    line: Tensor  # (2, 1 + 2 * MOST_KNOTS) float64, for it is steep: start, at and by of `Calibrated.bends`

    def __init__(self, config: FlashSkipSoftmaxConfig, num_heads: int, device: torch.device) -> None:
        super().__init__(config, num_heads, device)
        self.register_buffer("fixed", torch.zeros(2, num_heads, device=device), persistent=False)
        line = torch.zeros(2, 1 + 2 * MOST_KNOTS, dtype=torch.float64, device=device)
        self.register_buffer("line", line, persistent=False)
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
        self._fill()

    def set_calibrated(self, calibrated: Mapping[str, Calibrated]) -> None:
        self.calibrated = {**self.calibrated, **calibrated}
        self._fill()

    def _fill(self) -> None:
        """In place: compiled code goes on reading the buffers, and changes only where a phase changes its kind."""
        kinds = []
        for index, phase in enumerate(PHASES):
            calibrated, thresholds = self.calibrated.get(phase), self.config.thresholds.get(phase)
            if calibrated is not None:
                start, *bends = calibrated.bends()
                padded = [row + [0.0] * (MOST_KNOTS - len(row)) for row in bends]
                self.line[index].copy_(torch.tensor([start, *padded[0], *padded[1]], dtype=torch.float64))
                kinds.append(CALIBRATED if calibrated.target > 0 else DENSE)
            elif thresholds is not None:
                self.fixed[index].copy_(torch.tensor(thresholds))
                kinds.append(FIXED)
            else:
                kinds.append(DENSE)
        self.kinds = tuple(kinds)

    def threshold(self, visible_keys: Tensor, is_decoding: bool) -> Tensor | None:
        """λ (B, Hq) float32 of one call, None for a dense phase."""
        phase = DECODE if is_decoding else PREFILL
        if self.kinds[phase] == DENSE:
            return None
        if self.kinds[phase] == CALIBRATED:
            start, at, by = self.line[phase].split((1, MOST_KNOTS, MOST_KNOTS))
            log_keys = visible_keys.clamp(min=1)[:, None].to(torch.float64).log()
            log_threshold = start + ((log_keys - at).clamp(min=0) * by).sum(-1, keepdim=True)
            return log_threshold.exp().clamp(max=MOST_THRESHOLD).float().repeat(1, self.num_heads)
        return self.fixed[phase].repeat(visible_keys.shape[0], 1)

    def apply_sparsity(
        self, q: Tensor, k: Tensor, v: Tensor, visible_keys: Tensor, is_decoding: bool, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        attend: Any = attention
        if self.config.backend == "pytorch":
            attend, arguments = attention_reference, {**arguments, "upcast": False}
        threshold = self.threshold(visible_keys, is_decoding)
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
