"""What a method of sparse attention is, and the register of methods. A new method is one file beside this one."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from fa_ops.attention import attention
from fa_ops.integrations.huggingface import SPARSE_ATTENTION
from fa_ops.sparsity.config import BACKENDS, PHASES
from fa_ops.sparsity.counting import BlockCounts
from fa_ops.sparsity.curves import Calibrated

Method = TypeVar("Method", bound="type[SparseAttentionMethod]")
PREFILL, DECODE = range(2)
_MAKING = threading.Lock()


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


class SparseAttentionMethod(ABC):
    """The sparse attention of one attention module: its attribute `sparse_attention`, which the adapter calls.

    It is no module, and what it holds are plain values: whatever moves, empties, loads, shards or broadcasts a model
    passes it by. Tensors are made from the values at the first call on a device. They stay at their address and change
    with the values, so that compiled code and CUDA graphs read what the values are at that time. A copy and a pickle
    have the values alone, and make tensors of their own. Everything that differs between calls comes with the call.

    Attributes:
        num_heads: query heads of the module, in all processes together; a call may have a part of them.
        is_enabled: False makes the adapter call the op as if there were no method.
        collect_stats: whether calls count blocks, on the device.
        calibrated: by phase, what decides there in place of the configuration's thresholds.
        recorder: calibration's, in its time.
        companions: the methods of one model, whose tensors are made together: what is compiled for one layer then
            serves the next.
    """

    backends: ClassVar[tuple[str, ...]] = BACKENDS
    config_class: ClassVar[type]

    def __init__(self, config: Any, num_heads: int) -> None:
        self.config = config
        self.num_heads = num_heads
        self.is_enabled: bool = config.enable
        self.collect_stats: bool = config.collect_stats
        self.calibrated: dict[str, Calibrated] = {}
        self.recorder: Recorder | None = None
        self.companions: list[SparseAttentionMethod] = [self]
        self._heads_here = num_heads
        self._tensors: dict[torch.device, dict[str, Tensor]] = {}

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

    def make_tensors(self, device: torch.device) -> dict[str, Tensor]:
        """By name, the tensors that calls read, made from the values that they have now. Shapes and dtypes are always
        the same. A method without such tensors has none."""
        return {}

    def refresh(self) -> None:
        """Brings the tensors up to date, in place. Methods call it when their values have changed."""
        with _MAKING:
            for device, kept in self._tensors.items():
                for name, tensor in self.make_tensors(device).items():
                    kept[name].copy_(tensor)

    def tensors_beside(self, given: Tensor, num_heads: int) -> Mapping[str, Tensor]:
        """Those of `make_tensors` on the device of a tensor, and "counts", for a call with so many query heads."""
        if isinstance(given, FakeTensor):
            return self._all_tensors(given.device)
        self._prepare(given.device, num_heads)
        return self._tensors[given.device]

    @torch.compiler.assume_constant_result  # compiled code finds the tensors made, and never makes them
    def _prepare(self, device: torch.device, num_heads: int) -> None:
        self._heads_here = num_heads
        if device in self._tensors:
            return
        with _MAKING, torch.inference_mode(False), _disable_current_modes():
            for method in self.companions:
                if device not in method._tensors:
                    method._tensors[device] = method._all_tensors(device)

    def _all_tensors(self, device: torch.device) -> dict[str, Tensor]:
        counts = torch.zeros(2, 2, self.num_heads, dtype=torch.int64, device=device)
        return {**self.make_tensors(device), "counts": counts}

    def block_counts(self) -> Tensor:
        """Blocks counted by this process: (2, 2, Hq) int64 on the CPU, prefill and decode, visited and dropped. Heads
        are those that its calls have had, all heads before the first one."""
        counts = torch.zeros(2, 2, self.num_heads, dtype=torch.int64)
        for device, kept in self._tensors.items():
            if device.type != "meta":
                counts += kept["counts"].cpu()
        return counts[..., : self._heads_here]

    def reset_counts(self) -> None:
        for kept in self._tensors.values():
            kept["counts"].zero_()

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

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, visible_keys: Tensor, is_decoding: bool, arguments: Mapping[str, Any]
    ) -> Tensor:
        """What the adapter calls in place of `attention(q, k, v, **arguments)`.

        Args:
            q, k, v: as `attention` takes them, padded or packed; of Hq query heads, or of the part of them that a
                process has under tensor parallelism.
            visible_keys: (B,) int, keys that each sequence has at this call.
            is_decoding: whether the call has one query row.
            arguments: all other arguments of `attention`.
        """
        num_heads = q.shape[-2]
        if num_heads > self.num_heads:
            raise ValueError(f"q: {num_heads} heads given; {self.name} was set up for {self.num_heads}")
        if self.recorder is not None:
            if num_heads != self.num_heads:
                raise ValueError(
                    f"calibration: q has {num_heads} of {self.num_heads} heads, as under tensor parallelism; calibrate "
                    "the whole model in one process, and restore it in each"
                )
            self.recorder.record(self, q, k, visible_keys, is_decoding, arguments)
            return cast(Tensor, attention(q, k, v, **arguments))
        out, counts = self.apply_sparsity(q, k, v, visible_keys, is_decoding, arguments)
        if counts is not None and not torch.compiler.is_exporting():  # a program has no counts to add to
            phase = DECODE if is_decoding else PREFILL
            self.tensors_beside(q, num_heads)["counts"][phase, :, :num_heads].add_(counts.sum(1))
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": {}}

    def __repr__(self) -> str:
        phases = ", ".join(f"{phase}: {self.get_threshold_info()[phase]}" for phase in PHASES)
        return f"{self.name}(is_enabled={self.is_enabled}, backend={self.config.backend!r}, {phases})"


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
