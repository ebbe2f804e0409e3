"""A sparse model's settings as `config.json` holds them, and back.

The entry "fa_ops" alone gives the same bits back. The rest is for other readers, and is read where that entry is
missing: what it does not tell then has default values.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

import fa_ops
from fa_ops.integrations.huggingface_models import attention_modules, class_name, model_itself
from fa_ops.sparsity.attach import (
    attach,
    is_attn_sparsified,
    method_for,
    remove_sparse_attention,
    sparse_methods,
    warn_disabled,
)
from fa_ops.sparsity.config import PHASES, CalibrationConfig
from fa_ops.sparsity.curves import Calibrated, ShareCurve
from fa_ops.sparsity.methods.base import SparseAttentionMethod
from fa_ops_meta.skip import VISIT_ORDER

FORMULA = "a * exp(b * target_sparsity)"
ALGORITHMS = ("skip_softmax", "softmax_skip")
VERSION = 1

Model = TypeVar("Model", bound=nn.Module)


def export_sparse_attention_config(model: nn.Module) -> dict[str, Any]:
    """What `config.json` holds under "sparse_attention_config"; plain numbers, strings, lists and dictionaries.

    Raises ValueError for a model that is not sparse.
    """
    methods, modules = sparse_methods(model), attention_modules(model)
    classes = {name: class_name(modules[name]) for name in methods}
    return {
        "config_groups": dict(_groups(classes, methods)),
        "producer": {"name": "fa_ops", "version": fa_ops.__version__},
        "fa_ops": {
            "version": VERSION,
            "block": _common([[m.config.br, m.config.bc] for m in methods.values()]),
            "order": VISIT_ORDER,
            "calibrations": [
                {phase: _saved(own) for phase, own in calibrated.items()} for calibrated in _calibrations(methods)
            ],
            "modules": {name: _fields(method, _calibrations(methods)) for name, method in methods.items()},
        },
    }


def save_in_config(model: nn.Module) -> None:
    """Puts the settings where `save_pretrained` writes them: into the configuration of the model itself. A model
    without one has no such place."""
    config = getattr(model_itself(model), "config", None)
    if config is not None:
        config.sparse_attention_config = export_sparse_attention_config(model)


def restore_sparse_attention(model: Model) -> Model:
    """Makes a loaded model sparse again, from `model.config.sparse_attention_config`. Returns the model.

    Reads what `export_sparse_attention_config` returns; the same without its entry "fa_ops", as other producers write
    it; and the older form, with `sparse_algo` and `threshold_scale_factor` at the top. `log_a` may stand for `a`.

    Raises ValueError for a model without that entry, and by name for what it says and this version or model has not.
    """
    saved = getattr(getattr(model_itself(model), "config", None), "sparse_attention_config", None)
    if not isinstance(saved, Mapping):
        raise ValueError(f"{type(model).__name__}: its config has no sparse_attention_config; nothing to restore")
    modules = attention_modules(model)
    methods = dict(_own(saved["fa_ops"], modules) if "fa_ops" in saved else _foreign(saved, modules))
    if is_attn_sparsified(model):
        remove_sparse_attention(model)
    attach(model, methods)
    save_in_config(model)
    warn_disabled(methods)
    return model


def _groups(
    classes: Mapping[str, str], methods: Mapping[str, SparseAttentionMethod]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Modules of the same calibration together."""
    disabled = [name for name, method in methods.items() if not method.is_enabled]
    enabled = {name: method for name, method in methods.items() if method.is_enabled}
    different = _calibrations(enabled)
    if not all(method.calibrated for method in enabled.values()) or not enabled:
        different.append({})
    for number, calibrated in enumerate(different):
        names = [name for name, method in enabled.items() if method.calibrated == calibrated]
        group: dict[str, Any] = {
            "algorithm": ALGORITHMS[0],
            "targets": sorted({classes[name] for name in names}),
            "ignore": disabled,
        }
        if calibrated:
            factors = {phase: {"a": own.a, "b": own.b} for phase, own in calibrated.items()}
            group["threshold_scale_factor"] = {"formula": FORMULA, **factors}
            group["target_sparsity"] = {phase: own.target for phase, own in calibrated.items()}
        yield f"group_{number}", group


def _calibrations(methods: Mapping[str, SparseAttentionMethod]) -> list[dict[str, Calibrated]]:
    """What differs among the modules', each once."""
    different: list[dict[str, Calibrated]] = []
    for method in methods.values():
        if method.calibrated and method.calibrated not in different:
            different.append(method.calibrated)
    return different


def _saved(calibrated: Calibrated) -> dict[str, Any]:
    """As `json` gives it back."""
    fields = asdict(calibrated)
    if calibrated.curve is not None:
        curve = calibrated.curve
        shares = [list(row) for row in curve.shares]
        fields["curve"] = {**fields["curve"], "trials": list(curve.trials), "keys": list(curve.keys), "shares": shares}
    return fields


def _restored(saved: Mapping[str, Any]) -> Calibrated:
    curve = saved.get("curve")
    if curve is not None:
        shares = tuple(map(tuple, curve["shares"]))
        curve = ShareCurve(tuple(curve["trials"]), tuple(curve["keys"]), shares, curve["longest"])
    return Calibrated(saved["a"], saved["b"], saved["target"], curve)


def _fields(method: SparseAttentionMethod, calibrations: list[dict[str, Calibrated]]) -> dict[str, Any]:
    """`calibrated` is a number among "calibrations"."""
    calibrated = {"calibrated": calibrations.index(method.calibrated)} if method.calibrated else {}
    return {**asdict(method.config), "enable": method.is_enabled, "collect_stats": method.collect_stats} | calibrated


def _common(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def _own(saved: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, SparseAttentionMethod]]:
    for key, expected in (("version", VERSION), ("order", VISIT_ORDER)):
        if saved.get(key) != expected:
            raise ValueError(f"sparse_attention_config: {key} {saved.get(key)!r} given; this version has {expected!r}")
    for name, given in saved["modules"].items():
        if name not in modules:
            raise ValueError(f"sparse_attention_config: module {name!r} given; the model has {', '.join(modules)}")
        fields = dict(given)
        number = fields.pop("calibrated", None)
        method = method_for(name, modules[name], fields)
        if number is not None:
            method.set_calibrated({phase: _restored(own) for phase, own in saved["calibrations"][number].items()})
        yield name, method


def _foreign(saved: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, SparseAttentionMethod]]:
    groups = list(saved.get("config_groups", {}).values()) or [saved]
    classes = {class_name(module) for module in modules.values()}
    warned = False
    for group in groups:
        group = {**saved, **group}
        algorithm = group.get("algorithm", group.get("sparse_algo"))
        if algorithm not in ALGORITHMS:
            raise ValueError(f"sparse_attention_config: algorithm {algorithm!r} given; accepted are {ALGORITHMS}")
        targets = group.get("targets", sorted(classes))
        if not classes & set(targets):
            raise ValueError(f"sparse_attention_config: targets {targets} given; the model has {sorted(classes)}")
        calibrated = _calibrated(group)
        for name, module in modules.items():
            if class_name(module) not in targets:
                continue
            is_ignored = any(fnmatchcase(name, pattern) for pattern in group.get("ignore", []))
            method = method_for(name, module, {"enable": not is_ignored})
            method.set_calibrated(calibrated)
            if not warned:
                _warn_defaults(method, group)
                warned = True
            yield name, method


def _warn_defaults(method: SparseAttentionMethod, group: Mapping[str, Any]) -> None:
    config, known = method.config, method.get_threshold_info()
    defaults = [f"blocks of {config.br} x {config.bc}", f"visits {VISIT_ORDER}", f"backend {config.backend!r}"]
    if "target_sparsity" not in group or not method.calibrated:
        defaults.append(f"decided by {known}")
    warnings.warn(
        "sparse_attention_config: not written by fa_ops; what it does not tell has default values: "
        + ", ".join(defaults),
        stacklevel=2,
    )


def _calibrated(group: Mapping[str, Any]) -> dict[str, Calibrated]:
    factors = dict(group.get("threshold_scale_factor", {}))
    formula = factors.pop("formula", FORMULA)
    targets = group.get("target_sparsity", CalibrationConfig().target_sparse_ratio)
    calibrated = {}
    for phase, given in factors.items():
        if phase not in PHASES or not {"a", "log_a"} & set(given) or "b" not in given:
            raise ValueError(f"threshold_scale_factor[{phase!r}]: {given} given; accepted are {PHASES}, with a and b")
        if "a" in given and formula != FORMULA:
            raise ValueError(f"threshold_scale_factor: formula {formula!r} given; accepted is {FORMULA!r}")
        a = given["a"] if "a" in given else math.exp(given["log_a"])
        calibrated[phase] = Calibrated(float(a), float(given["b"]), float(targets.get(phase, 0.0)))
    return calibrated
