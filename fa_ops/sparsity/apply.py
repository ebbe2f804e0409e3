"""`sparsify` and what changes a sparse model afterwards."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fa_ops.sparsity.attach import (
    attach,
    is_attn_sparsified,
    methods_for,
    remove_sparse_attention,
    selected_methods,
    state_of,
    warn_disabled,
)
from fa_ops.sparsity.calibration import Texts, run_calibration
from fa_ops.sparsity.config import CalibrationConfig, Pattern, SparseAttentionConfig, check_targets, from_fields
from fa_ops.sparsity.export import save_in_config
from fa_ops.sparsity.methods.base import SparseAttentionMethod

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    config: SparseAttentionConfig | Mapping[str, Any],
    forward_loop: Texts | None = None,
    *,
    tokenizer: Any = None,
) -> Model:
    """Makes the attention of a Transformers model sparse, in place, and calibrates it if the configuration asks for it.

    Sets the attention implementation of the modules that the patterns match to "modelopt_triton", gives each its
    method, and writes `model.config.sparse_attention_config`, which `save_pretrained` saves. A model that is already
    sparse is given back first, and is no longer sparse if this one fails.

    Args:
        model: Transformers model, or what is wrapped around one: torch.compile, DDP, PEFT, a plain module. State and
            names are always those of the model itself, the outermost `PreTrainedModel`.
        config: {"sparse_cfg": {pattern: fields}}, see `fa_ops.sparsity.config`.
        forward_loop: what to calibrate with, see `calibrate`.
        tokenizer: of `forward_loop`'s strings, called as Transformers' tokenizers are.

    Returns:
        The model.

    Raises:
        ValueError: a field, pattern or module that is not accepted, by name; a module around several models.
        CalibrationError: a target that cannot be reached, or too few figures.
    """
    config = SparseAttentionConfig.of(config)
    if not config.layers:
        warnings.warn("sparse_cfg: no pattern given for any layer; the model stays as it is", stacklevel=2)
        return model
    if (config.calibration is None) != (forward_loop is None):
        given, missing = ("calibration", "forward_loop") if forward_loop is None else ("forward_loop", "calibration")
        raise ValueError(
            f"{missing}: none given, with a {given}; expected both (forward_loop: a function of the model, strings or "
            "token ids) or none"
        )
    methods = methods_for(model, config)
    _refuse_without_thresholds(methods, config.calibration)
    if is_attn_sparsified(model):
        remove_sparse_attention(model)
    attach(model, methods)
    try:
        if config.calibration is not None and forward_loop is not None:
            state_of(model).calibration = run_calibration(model, config.calibration, forward_loop, tokenizer)
        save_in_config(model)
    except BaseException:
        remove_sparse_attention(model)
        raise
    warn_disabled(methods)
    return model


def calibrate(
    model: Model,
    config: CalibrationConfig | Mapping[str, Any],
    forward_loop: Texts,
    *,
    tokenizer: Any = None,
) -> Model:
    """Finds λ for a target share and a number of keys, for the enabled modules of a sparse model, in both phases.

    The model runs dense while every trial λ is counted. Nothing changes if it fails. Under tensor parallelism no
    process sees all heads: calibrate the whole model in one, and restore what it found in each.

    Args:
        config: the fields of `CalibrationConfig`.
        forward_loop: a function of the model, as it was given here, that runs it as it will be used; or strings, or
            sequences of token ids. These are joined and cut into lengths of max_seqlen, which the model itself runs;
            for models that are not causal also of its half, ...
        tokenizer: of strings; None takes their bytes.

    Raises:
        CalibrationError: a target that cannot be reached, or too few figures; it says what to change.
        ValueError: calls with a part of the heads.
    """
    config = from_fields(CalibrationConfig, config, "calibration")
    state_of(model).calibration = run_calibration(model, config, forward_loop, tokenizer)
    save_in_config(model)
    return model


def enable_sparse_attention(model: nn.Module, pattern: Pattern = "*") -> None:
    """Lets the modules be sparse whose names a glob or a callable matches; ValueError if it matches none."""
    _switch(model, pattern, True)


def disable_sparse_attention(model: nn.Module, pattern: Pattern = "*") -> None:
    """Lets the modules run dense whose names a glob or a callable matches; ValueError if it matches none."""
    _switch(model, pattern, False)


def _switch(model: nn.Module, pattern: Pattern, is_enabled: bool) -> None:
    for method in selected_methods(model, pattern).values():
        method.is_enabled = is_enabled
    save_in_config(model)


def set_thresholds(model: nn.Module, thresholds: Mapping[str, Any], pattern: Pattern = "*") -> None:
    """Gives the modules that match other λ, {"prefill": [λ], "decode": [λ]}; compiled code is not compiled again.

    Each list has one number in (0, 1), or one for each query head; [] makes the phase dense. Phases that are not named
    keep what they have. Under tensor parallelism, where a process has a part of the heads, calls accept one number
    alone and raise ValueError with more.
    """
    for method in selected_methods(model, pattern).values():
        method.set_thresholds(thresholds)
    save_in_config(model)


def set_target_sparse_ratio(model: nn.Module, target_sparse_ratio: Mapping[str, float], pattern: Pattern = "*") -> None:
    """Gives calibrated modules that match another share to drop; compiled code is not compiled again.

    Phases that are not named keep theirs. Warns of a target above the largest share that calibration has seen: shorter
    sequences drop what they can.
    """
    targets = {
        phase: target for phase, target in check_targets(target_sparse_ratio).items() if phase in target_sparse_ratio
    }
    selected = selected_methods(model, pattern)
    for name, method in selected.items():
        for phase in targets:
            if phase not in method.calibrated:
                raise ValueError(
                    f"{name}: target_sparse_ratio[{phase!r}] given, but it is not calibrated; see calibrate"
                )
    for name, method in selected.items():
        calibrated = {phase: method.calibrated[phase].with_target(target) for phase, target in targets.items()}
        for phase, own in calibrated.items():
            if own.target > own.largest_share:
                warnings.warn(
                    f"{name}: target_sparse_ratio[{phase!r}]: {own.target} given; calibration has seen "
                    f"{own.largest_share:.3f} at most, at {own.longest:.0f} keys; fewer drop what they can",
                    stacklevel=2,
                )
        method.set_calibrated(calibrated)
    save_in_config(model)


def _refuse_without_thresholds(
    methods: Mapping[str, SparseAttentionMethod], calibration: CalibrationConfig | None
) -> None:
    for name, method in methods.items():
        is_dense = not any(method.get_threshold_info().values())
        if method.is_enabled and calibration is None and is_dense:
            raise ValueError(f"{name}: thresholds: none given, and no calibration; the module would run dense")
