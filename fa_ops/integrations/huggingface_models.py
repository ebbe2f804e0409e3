"""Which modules of a Transformers model call its attention interface, and what switches them to this backend and back.

Nothing here changes a class or a register of Transformers beyond `register_triton_attention`.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from fa_ops.integrations.huggingface import register_triton_attention
from fa_ops.integrations.huggingface_guard import calls_interface
from fa_ops.integrations.huggingface_pattern import ATTENTION_NAME

# What torch.compile, activation checkpointing and FSDP1 put into the names of the modules that they wrap.
WRAPPER_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class PreviousImplementation(NamedTuple):
    """The attention implementation that a configuration named before."""

    config: Any
    implementation: str | None

    def restore(self) -> None:
        self.config._attn_implementation_internal = self.implementation


def model_itself(module: nn.Module) -> nn.Module:
    """The model of Transformers in what is wrapped around it, such as torch.compile, DDP, PEFT or a plain module.

    It is the outermost PreTrainedModel: the models inside one are parts of it. A module without one is returned as it
    is. Raises ValueError for a module around several, each of which has a configuration of its own.
    """
    from transformers import PreTrainedModel

    models = _outermost(module, PreTrainedModel)
    if len(models) > 1:
        raise ValueError(
            f"{type(module).__name__}: {len(models)} models given, {' and '.join(models)}; accepted is one at a time"
        )
    return next(iter(models.values()), module)


def _outermost(module: nn.Module, kind: type, prefix: str = "") -> dict[str, nn.Module]:
    """By name, the modules of a kind that lie in no other of that kind, each once."""
    if isinstance(module, kind):
        return {prefix: module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        for own, model in _outermost(child, kind, f"{prefix}.{name}" if prefix else name).items():
            if not any(model is other for other in found.values()):
                found[own] = model
    return found


def own_name(name: str) -> str:
    """A module's name without the parts that wrappers inside the model put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def class_name(module: nn.Module) -> str:
    """The name of a module's class. Of a class that torch made from the model's own, such as FSDP2's, the model's."""
    return next(base for base in type(module).__mro__ if not base.__module__.startswith("torch.")).__name__


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose own code calls Transformers' attention interface, in the order of the model, by the names that
    the model itself gives them."""
    model = model_itself(model)
    classes = {module_class for module_class in map(type, model.modules()) if calls_interface(module_class)}
    return {own_name(name): module for name, module in model.named_modules() if type(module) in classes}


def num_query_heads(module: nn.Module) -> int:
    """Query heads of an attention module in all processes together: under tensor parallelism each has a part of them.

    Raises ValueError where the module does not tell.
    """
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(heads := getattr(owner, name, None), int):
                return heads
    raise ValueError(f"{type(module).__name__}: neither it nor its config has num_heads or num_attention_heads")


def implementation_of(module: nn.Module) -> str | None:
    """The attention implementation that a module's configuration names now."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def use_triton_attention(model: nn.Module, modules: dict[str, nn.Module]) -> list[PreviousImplementation]:
    """Switches the models that own the modules to `modelopt_triton`, and returns what there was before.

    Transformers only warns where it does not switch: every module is looked at afterwards. Raises ValueError, with all
    configurations as they were, naming the module that stayed behind.
    """
    register_triton_attention()
    owners = _owners(model, modules)
    previous = [PreviousImplementation(c, c._attn_implementation) for owner in owners for c in _configs(owner)]
    try:
        for owner in owners:
            owner.set_attn_implementation(ATTENTION_NAME)
        for name, module in modules.items():
            if implementation_of(module) != ATTENTION_NAME:
                raise ValueError(
                    f"{name} ({type(module).__name__}): its attention implementation stays "
                    f"{implementation_of(module)!r}; Transformers cannot switch this model to {ATTENTION_NAME!r}"
                )
    except BaseException:
        for before in previous:
            before.restore()
        raise
    return previous


def _owners(model: nn.Module, modules: Iterable[str]) -> list[Any]:
    """The innermost PreTrainedModel around each module."""
    from transformers import PreTrainedModel

    models = {own_name(name): module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    owners: dict[str, None] = {}
    for name in modules:
        around = [prefix for prefix in models if prefix == "" or name.startswith(f"{prefix}.")]
        if not around:
            raise ValueError(f"{name}: no PreTrainedModel of Transformers around it; its attention cannot be switched")
        owners[max(around, key=len)] = None
    return [models[prefix] for prefix in owners]


def _configs(model: Any) -> Iterator[Any]:
    """Every configuration that `model.set_attn_implementation` may change, once."""
    waiting = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    seen = set()
    while waiting:
        config = waiting.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting.extend(sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None)
