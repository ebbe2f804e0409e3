"""Skip-softmax (BLASST, arXiv 2512.12087): blocks whose scores lie far below the running maximum are left out.

λ of a phase is one number for each head, or a * exp(b * target) / keys ** length_power from calibration, for the keys
that a sequence has at that call.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa_ops.attention import attention
from fa_ops.reference import attention_reference
from fa_ops.sparsity.config import PHASES, FlashSkipSoftmaxConfig
from fa_ops.sparsity.counting import BlockCounts, count_dropped
from fa_ops.sparsity.methods.base import (
    DECODE,
    MOST_THRESHOLD,
    PREFILL,
    Calibrated,
    SparseAttentionMethod,
    register_sparse_method,
)

DENSE, FIXED, CALIBRATED = range(3)


@register_sparse_method("flash_skip_softmax")
class FlashSkipSoftmax(SparseAttentionMethod):
    config_class: ClassVar[type] = FlashSkipSoftmaxConfig
    config: FlashSkipSoftmaxConfig
    scale: Tensor  # (2, Hq) float32: λ, or λ of a single key
    length_power: Tensor  # (2,) float32

    def __init__(self, config: FlashSkipSoftmaxConfig, num_heads: int, device: torch.device) -> None:
        super().__init__(config, num_heads, device)
        self.register_buffer("scale", torch.zeros(2, num_heads, device=device), persistent=False)
        self.register_buffer("length_power", torch.zeros(2, device=device), persistent=False)
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
                self.scale[index].fill_(calibrated.scale)
                self.length_power[index].fill_(calibrated.length_power)
                kinds.append(CALIBRATED if calibrated.target > 0 else DENSE)
            elif thresholds is not None:
                self.scale[index].copy_(torch.tensor(thresholds))
                kinds.append(FIXED)
            else:
                kinds.append(DENSE)
        self.kinds = tuple(kinds)

    def threshold(self, visible_keys: Tensor, is_decoding: bool) -> Tensor | None:
        """λ (B, Hq) float32 of one call, None for a dense phase."""
        phase = DECODE if is_decoding else PREFILL
        if self.kinds[phase] == DENSE:
            return None
        scale = self.scale[phase]
        if self.kinds[phase] == CALIBRATED:
            keys = visible_keys.clamp(min=1)[:, None].to(torch.float32)
            return (scale / keys ** self.length_power[phase]).clamp(max=MOST_THRESHOLD)
        return scale.repeat(visible_keys.shape[0], 1)

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
        """For each phase None, {"thresholds": [λ]}, or {"a", "b", "target", "length_power", "longest"}."""
        info: dict[str, Any] = {}
        for phase, kind in zip(PHASES, self.kinds, strict=True):
            if kind == DENSE:
                info[phase] = None
            elif kind == FIXED:
                info[phase] = {"thresholds": self.config.thresholds[phase]}
            else:
                info[phase] = asdict(self.calibrated[phase])
        return info
