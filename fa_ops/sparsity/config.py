"""What `sparsify` is told: dataclasses that refuse what they do not know, and presets.

    {"sparse_cfg": {pattern: layer fields, ..., "default": layer fields, "calibration": calibration fields}}

A pattern is a glob or a callable over the names of the modules that call Transformers' attention interface. The fields
of a module are those of "default", then those of every pattern that matches it, in order. A module that no pattern
matches stays as it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from fa_ops_meta.skip import BLOCK_SIZES

Pattern = str | Callable[[str], bool]
Config = TypeVar("Config")

PHASES = ("prefill", "decode")
BACKENDS = ("pytorch", "triton")

# λ of the presets, which no calibration has adapted to a model: of 0.3, 0.1, 0.03, ... the largest that added no more
# than 0.1 % to the loss of a model of 135 million parameters at 1,024 tokens with the default block: .26 and .25 of the
# blocks were dropped (examples/benchmarks/results/sparsity-study-smollm2.md). Smaller blocks and longer texts drop
# more. Decoding needs a smaller λ: a single row drops blocks that another row of a block of queries would keep.
DEFAULT_THRESHOLDS = {"prefill": 0.1, "decode": 0.003}
# Fewer than 32, a power of two, for the kernel's sake; dense towards 1, where what is left of the blocks is decided.
DEFAULT_TRIALS = (
    1e-6, 1e-5, 5e-5, 1e-4, 2e-4, 4e-4, 7e-4, 1.2e-3, 2e-3, 3.5e-3, 6e-3, 0.01, 0.015, 0.022, 0.032, 0.045, 0.065,
    0.09, 0.12, 0.16, 0.21, 0.27, 0.34, 0.42, 0.5, 0.58, 0.66, 0.74, 0.82, 0.9, 0.99,
)  # fmt: skip


@dataclass(frozen=True)
class FlashSkipSoftmaxConfig:
    """Fields of one attention module.

    Attributes:
        method: name of a registered method.
        enable: False leaves the module dense.
        thresholds: λ of "prefill" and "decode", each one number in (0, 1) or one for each query head. A phase without
            one is dense. Calibration replaces them. Under tensor parallelism, where a process has a part of the heads,
            calls accept one number alone.
        br, bc: query rows and keys of a block, each 16, 32, 64 or 128. They are part of the meaning.
        backend: "triton" runs the op, "pytorch" an explicit eager implementation of the same definition.
        collect_stats: count visited and dropped blocks of every call, on the device.
        is_causal: what the module is expected to be; None expects nothing.
    """

    method: str = "flash_skip_softmax"
    enable: bool = True
    thresholds: dict[str, list[float]] = field(default_factory=lambda: {p: [v] for p, v in DEFAULT_THRESHOLDS.items()})
    br: int = 64
    bc: int = 128
    backend: str = "pytorch"
    collect_stats: bool = False
    is_causal: bool | None = None

    def __post_init__(self) -> None:
        for name in ("enable", "collect_stats"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} given; accepted are True and False")
        for name in ("br", "bc"):
            if getattr(self, name) not in BLOCK_SIZES:
                raise ValueError(f"{name}: {getattr(self, name)!r} given; accepted are {BLOCK_SIZES}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: {self.backend!r} given; accepted are {BACKENDS}")
        if self.is_causal not in (None, True, False):
            raise ValueError(f"is_causal: {self.is_causal!r} given; accepted are None, True and False")
        object.__setattr__(self, "thresholds", _thresholds(self.thresholds))


@dataclass(frozen=True)
class CalibrationConfig:
    """How λ is found for a target and a number of keys.

    Attributes:
        target_sparse_ratio: share of the visited blocks to drop in "prefill" and in "decode", in [0, 1); 0 leaves a
            phase dense.
        samples: number of texts that are run, at least, divided over the lengths.
        min_tokens: more texts are run until they hold so many tokens, as far as there are; fewer are not exact.
        max_seqlen: longest text, tokens; no longer than the model's own maximum.
        num_length_bins: number of lengths, each half of the one before; lengths of less than 8 blocks are left out. A
            causal model runs the longest alone, which has the shorter ones in it.
        chunk_size: tokens that a prefill is run in at a time, tokens; rounded up to whole blocks.
        num_decode_tokens: rows of each quarter of a prefill call that decoding is counted at.
        threshold_trials: the λ that are counted, ascending, in (0, 1).
    """

    target_sparse_ratio: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.5))
    samples: int = 24
    min_tokens: int = 49152
    max_seqlen: int = 32768
    num_length_bins: int = 4
    chunk_size: int = 2048
    num_decode_tokens: int = 10
    threshold_trials: tuple[float, ...] = DEFAULT_TRIALS

    def __post_init__(self) -> None:
        for name in ("samples", "min_tokens", "max_seqlen", "num_length_bins", "chunk_size", "num_decode_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} given; accepted are integers from 1 on")
        object.__setattr__(self, "target_sparse_ratio", check_targets(self.target_sparse_ratio))
        trials = tuple(self.threshold_trials)
        if len(trials) < 2 or sorted(set(trials)) != list(trials) or not all(0 < trial < 1 for trial in trials):
            raise ValueError(f"threshold_trials: {trials} given; accepted are numbers in (0, 1), ascending")
        object.__setattr__(self, "threshold_trials", trials)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """The whole: what is under "sparse_cfg", checked."""

    layers: tuple[tuple[Pattern, dict[str, Any]], ...]
    default: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationConfig | None = None

    @classmethod
    def of(cls, config: "SparseAttentionConfig | Mapping[str, Any]") -> "SparseAttentionConfig":
        """Checks a dictionary; the layers' fields are checked with their method, by `fields_of`."""
        if isinstance(config, SparseAttentionConfig):
            return config
        _refuse_others(config, ("sparse_cfg",), "config")
        if "sparse_cfg" not in config:
            raise ValueError('config: no "sparse_cfg" given; expected {"sparse_cfg": {pattern: fields}}')
        layers, default, calibration = [], {}, None
        for key, given in config["sparse_cfg"].items():
            if key == "calibration":
                calibration = given if given is None else from_fields(CalibrationConfig, given, "calibration")
            elif key == "default":
                default = as_fields(given, key)
            else:
                layers.append((key, as_fields(given, str(key))))
        return cls(tuple(layers), default, calibration)

    def fields_of(self, name: str) -> dict[str, Any] | None:
        """The merged fields of a module, None where no pattern matches."""
        matching = [given for pattern, given in self.layers if matches(pattern, name)]
        if not matching:
            return None
        merged = dict(self.default)
        for given in matching:
            merged.update(given)
        return merged


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a glob or a callable selects the module of this name."""
    return bool(pattern(name)) if callable(pattern) else fnmatchcase(name, pattern)


def from_fields(config_class: type[Config], given: Any, where: str) -> Config:
    """A dataclass from a dictionary (or itself); ValueError for fields that it does not have."""
    if isinstance(given, config_class):
        return given
    accepted = tuple(f.name for f in fields(config_class))  # type: ignore[arg-type]
    _refuse_others(given, accepted, where)
    try:
        return config_class(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def as_fields(given: Any, where: str) -> dict[str, Any]:
    """Layer fields as a dictionary, from one or from a dataclass."""
    if isinstance(given, Mapping):
        return dict(given)
    if hasattr(given, "__dataclass_fields__") and not isinstance(given, type):
        return asdict(given)
    raise ValueError(f"sparse_cfg[{where!r}]: {given!r} given; expected a dictionary of fields or a configuration")


def check_targets(given: Any) -> dict[str, float]:
    """`target_sparse_ratio`, or ValueError."""
    _refuse_others(given, PHASES, "target_sparse_ratio")
    for phase, target in given.items():
        if not _is_number(target) or not 0 <= target < 1:
            raise ValueError(f"target_sparse_ratio[{phase!r}]: {target!r} given; accepted are numbers in [0, 1)")
    return {phase: float(given.get(phase, 0.0)) for phase in PHASES}


def _thresholds(given: Any) -> dict[str, list[float]]:
    _refuse_others(given, PHASES, "thresholds")
    checked = {}
    for phase, values in given.items():
        values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
        for value in values:
            if not _is_number(value) or not 0 < value < 1:
                raise ValueError(f"thresholds[{phase!r}]: {value!r} given; accepted are numbers in (0, 1)")
        if values:
            checked[phase] = [float(value) for value in values]
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_others(given: Any, accepted: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {given!r} given; expected a dictionary with {', '.join(accepted)}")
    for key in given:
        if key not in accepted:
            raise ValueError(f"{where}: unknown field {key!r}; accepted are {', '.join(accepted)}")


# Everywhere, with DEFAULT_THRESHOLDS.
SKIP_SOFTMAX_DEFAULT: dict[str, Any] = {"sparse_cfg": {"*": {"method": "flash_skip_softmax", "enable": True}}}

# Everywhere, with a λ that calibration finds for half of the blocks: the loss that this adds depends on the model.
SKIP_SOFTMAX_CALIB: dict[str, Any] = {
    "sparse_cfg": {
        "*": {"method": "flash_skip_softmax", "enable": True},
        "calibration": {"target_sparse_ratio": dict.fromkeys(PHASES, 0.5)},
    }
}
