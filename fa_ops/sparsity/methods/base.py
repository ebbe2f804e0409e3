"""What a method of sparse attention is, and the register of methods. A new method is one file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from fa_ops.attention import attention
from fa_ops.integrations.huggingface import SPARSE_ATTENTION
from fa_ops.sparsity.config import BACKENDS, PHASES
from fa_ops.sparsity.counting import BlockCounts
from fa_ops.sparsity.curves import Calibrated

Method = TypeVar("Method", bound="type[SparseAttentionMethod]")
PREFILL, DECODE = range(2)


class Recorder(Protocol):
    """Takes what a module would drop, while the module itself stays dense."""

    def record(
        self,
        method: "SparseAttentionMethod",
        q: Tensor,
        k: Tensor,
        visible_keys: Tensor,
        is_decoding: bool,
        arguments: Mapping[str, Any],
    ) -> None: ...


class SparseAttentionMethod(nn.Module, ABC):
    """The sparse attention of one attention module: its child `sparse_attention`, which the adapter asks.

    Everything that differs between calls comes with the call. Numbers that may change between calls are non-persistent
    buffers: a state dict does not have them, and compiled code reads what they are at that time.

    Attributes:
        is_enabled: False makes the adapter call the op as if there were no method.
        collect_stats: whether calls add to `counts`, (2, 2, Hq) int64: prefill and decode, visited and dropped.
        calibrated: by phase, what decides there in place of the configuration's thresholds.
        recorder: calibration's, in its time.
    """

    backends: ClassVar[tuple[str, ...]] = BACKENDS
    config_class: ClassVar[type]
    counts: Tensor

    def __init__(self, config: Any, num_heads: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.is_enabled: bool = config.enable
        self.collect_stats: bool = config.collect_stats
        self.calibrated: dict[str, Calibrated] = {}
        self.recorder: Recorder | None = None
        counts = torch.zeros(2, 2, num_heads, dtype=torch.int64, device=device)
        self.register_buffer("counts", counts, persistent=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """The name under which the method is registered."""

    @abstractmethod
    def calculate_sparsity(
        self, q: Tensor, k: Tensor, trials: tuple[float, ...], arguments: Mapping[str, Any]
    ) -> BlockCounts:
        """What each trial threshold would drop of dense attention, q, k and arguments being those of `attention`."""

    @abstractmethod
    def apply_sparsity(
        self, q: Tensor, k: Tensor, v: Tensor, visible_keys: Tensor, is_decoding: bool, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Sparse attention: (out, counts), counts (2, B, Hq) int64 with `collect_stats`, None where nothing can be
        dropped."""

    @abstractmethod
    def get_threshold_info(self) -> dict[str, Any]:
        """For "prefill" and "decode", what decides there, in numbers; None for a dense phase."""

    def set_thresholds(self, thresholds: Mapping[str, Any]) -> None:
        """λ of the phases given, in place of what decided there before; [] makes a phase dense."""
        raise NotImplementedError(f"thresholds: {dict(thresholds)} given; {self.name} has none")

    def set_calibrated(self, calibrated: Mapping[str, Calibrated]) -> None:
        """What calibration found for the phases given, in place of what decided there before."""
        raise NotImplementedError(f"calibration: {dict(calibrated)} given; {self.name} has none")

    @contextmanager
    def get_sparse_context(self, module: nn.Module) -> Iterator["SparseAttentionMethod"]:
        """Within it `module` attends through this method, and after it as before."""
        previous = getattr(module, SPARSE_ATTENTION, None)
        setattr(module, SPARSE_ATTENTION, self)
        try:
            yield self
        finally:
            delattr(module, SPARSE_ATTENTION)
            if previous is not None:
                setattr(module, SPARSE_ATTENTION, previous)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, visible_keys: Tensor, is_decoding: bool, arguments: Mapping[str, Any]
    ) -> Tensor:
        """What the adapter calls in place of `attention(q, k, v, **arguments)`.

        Args:
            q, k, v: as `attention` takes them, padded or packed.
            visible_keys: (B,) int, keys that each sequence has at this call.
            is_decoding: whether the call has one query row.
            arguments: all other arguments of `attention`.
        """
        if q.shape[-2] != self.num_heads:
            raise ValueError(f"q: {q.shape[-2]} heads given; {self.name} was set up for {self.num_heads}")
        if self.recorder is not None:
            self.recorder.record(self, q, k, visible_keys, is_decoding, arguments)
            return cast(Tensor, attention(q, k, v, **arguments))
        out, counts = self.apply_sparsity(q, k, v, visible_keys, is_decoding, arguments)
        if counts is not None:
            self.counts[DECODE if is_decoding else PREFILL] += counts.sum(1)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseAttentionMethod":
        """Buffers follow the model to its device, but not to its dtype."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        phases = ", ".join(f"{phase}: {self.get_threshold_info()[phase]}" for phase in PHASES)
        return f"{self.name}, is_enabled={self.is_enabled}, backend={self.config.backend!r}, {phases}"


_METHODS: dict[str, dict[str, type[SparseAttentionMethod]]] = {}


def register_sparse_method(name: str, version: str = "v1") -> Callable[[Method], Method]:
    """Class decorator: registers a method under a name. The version registered last is the one that is used."""

    def register(method: Method) -> Method:
        _METHODS.setdefault(name, {})[version] = method
        return method

    return register


def get_sparse_method(name: str, version: str | None = None) -> type[SparseAttentionMethod]:
    """The class registered under a name; ValueError with the names that are."""
    versions = _METHODS.get(name)
    if versions is None:
        raise ValueError(f"method: {name!r} given; registered are {', '.join(sorted(_METHODS))}")
    if version is None:
        return list(versions.values())[-1]
    if version not in versions:
        raise ValueError(f"version: {version!r} of {name!r} given; registered are {', '.join(versions)}")
    return versions[version]
