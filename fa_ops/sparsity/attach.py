"""Makes the attention modules of a model sparse, changes what they do, and gives the model back as it was.

A sparse model's state lies on the model itself, and so do the names of its modules, whatever is wrapped around it or
around its layers: functions take the model or what is around it, and do the same.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fa_ops.integrations.huggingface import SPARSE_ATTENTION
from fa_ops.integrations.huggingface_models import (
    PreviousImplementation,
    attention_modules,
    class_name,
    implementation_of,
    model_itself,
    num_query_heads,
    use_triton_attention,
)
from fa_ops.integrations.huggingface_pattern import ATTENTION_NAME
from fa_ops.sparsity.config import Pattern, SparseAttentionConfig, from_fields, matches
from fa_ops.sparsity.methods.base import SparseAttentionMethod, get_sparse_method

STATE = "_sparse_attention_state"
DEFAULT_METHOD = "flash_skip_softmax"


@dataclass
class SparseState:
    """What a sparse model remembers beside its methods: how it was before, and its calibration by phase."""

    previous: list[PreviousImplementation]
    guards: list[RemovableHandle]
    calibration: dict[str, Any] = field(default_factory=dict)


def methods_for(model: nn.Module, config: SparseAttentionConfig) -> dict[str, SparseAttentionMethod]:
    """The method of each module that a pattern matches, by its name; the model is only looked at.

    Raises ValueError, by name, for a model without attention modules, a pattern that matches nothing, and fields that
    a module or its method does not accept.
    """
    modules = attention_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__}: none of its modules calls Transformers' attention interface, so nothing in it "
            "can be made sparse"
        )
    for pattern, _ in config.layers:
        if not any(matches(pattern, name) for name in modules):
            raise ValueError(
                f"sparse_cfg: the pattern {pattern!r} matches none of the modules that call the attention interface: "
                f"{', '.join(modules)}"
            )
    fields_of = {name: given for name in modules if (given := config.fields_of(name)) is not None}
    methods = {name: method_for(name, modules[name], fields) for name, fields in fields_of.items()}
    backends = {method.config.backend for method in methods.values()}
    if len(backends) > 1:
        raise ValueError(f"backend: {' and '.join(sorted(backends))} given; a model accepts one for all its modules")
    return methods


def method_for(name: str, module: nn.Module, fields: Mapping[str, Any]) -> SparseAttentionMethod:
    """One module's method, checked against the module."""
    try:
        method_class = get_sparse_method(fields.get("method", DEFAULT_METHOD))
        config: Any = from_fields(method_class.config_class, fields, "fields")
        if config.backend not in method_class.backends:
            raise ValueError(
                f"backend: {config.backend!r} given; {config.method} accepts {', '.join(method_class.backends)}"
            )
        is_causal = getattr(module, "is_causal", None)
        if config.is_causal is not None and is_causal is not None and config.is_causal != is_causal:
            raise ValueError(f"is_causal: {config.is_causal} given; the module has {is_causal}")
        return method_class(config, num_query_heads(module))
    except ValueError as error:
        raise ValueError(f"{name} ({class_name(module)}): {error}") from None


def attach(model: nn.Module, methods: Mapping[str, SparseAttentionMethod]) -> None:
    """Switches the attention implementation, then gives every module its method.

    Raises ValueError where a module is sparse already: as part of a model inside or around this one.
    """
    model = model_itself(model)
    modules = {name: module for name, module in attention_modules(model).items() if name in methods}
    for name, module in modules.items():
        if hasattr(module, SPARSE_ATTENTION):
            raise ValueError(
                f"{name} ({class_name(module)}): it is sparse already, and {type(model).__name__} is not; call "
                "remove_sparse_attention with the model inside or around it that sparsify was given"
            )
    state = SparseState(use_triton_attention(model, modules), [])
    companions = list(methods.values())
    for name, module in modules.items():
        methods[name].companions = companions
        setattr(module, SPARSE_ATTENTION, methods[name])
        state.guards.append(module.register_forward_pre_hook(_refuse_other_implementation))
    setattr(model, STATE, state)


def _refuse_other_implementation(module: nn.Module, _: Any) -> None:
    if implementation_of(module) != ATTENTION_NAME:
        raise RuntimeError(
            f"{class_name(module)}: the attention implementation was changed to {implementation_of(module)!r}, "
            "which would run dense; call remove_sparse_attention first"
        )


def is_attn_sparsified(model: nn.Module) -> bool:
    """Whether `sparsify` or `restore_sparse_attention` was applied to this model, enabled or not."""
    return hasattr(model_itself(model), STATE)


def state_of(model: nn.Module) -> SparseState:
    """ValueError for a model that is not sparse."""
    if not is_attn_sparsified(model):
        raise ValueError(f"{type(model).__name__}: not a sparse model; call sparsify first")
    return getattr(model_itself(model), STATE)


def sparse_methods(model: nn.Module) -> dict[str, SparseAttentionMethod]:
    """The methods of a sparse model by the names of their modules."""
    state_of(model)
    found = ((name, getattr(module, SPARSE_ATTENTION, None)) for name, module in attention_modules(model).items())
    return {name: method for name, method in found if isinstance(method, SparseAttentionMethod)}


def selected_methods(model: nn.Module, pattern: Pattern) -> dict[str, SparseAttentionMethod]:
    """Those whose module a pattern matches; ValueError if there is none."""
    methods = sparse_methods(model)
    selected = {name: method for name, method in methods.items() if matches(pattern, name)}
    if not selected:
        raise ValueError(f"pattern: {pattern!r} matches none of the sparse modules: {', '.join(methods)}")
    return selected


def remove_sparse_attention(model: nn.Module) -> nn.Module:
    """Gives the model back as it was before `sparsify`, its attention implementation included. Returns it."""
    state, own = state_of(model), model_itself(model)
    modules = attention_modules(own)
    for name in sparse_methods(own):
        delattr(modules[name], SPARSE_ATTENTION)
    for guard in state.guards:
        guard.remove()
    for before in state.previous:
        before.restore()
    delattr(own, STATE)
    config: Any = getattr(own, "config", None)
    if hasattr(config, "sparse_attention_config"):
        del config.sparse_attention_config
    return model


def warn_disabled(methods: Mapping[str, SparseAttentionMethod]) -> None:
    disabled = [name for name, method in methods.items() if not method.is_enabled]
    if disabled:
        warnings.warn(f"sparse attention: disabled, so dense, are {', '.join(disabled)}", stacklevel=3)
