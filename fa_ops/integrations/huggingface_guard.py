"""Which models may have `attn_implementation="modelopt_triton"`: those whose attention is sure to call ours.

Transformers accepts a registered name for every model. A model that computes attention itself then gets masks of our
mask function, which only our attention function can read. So the classes of a model are looked at, without running
them: which parts it is built of, which of these call Transformers' attention interface, and which compute attention
themselves. The rule is the same for Transformers' own models, for remote code and for classes of the user's own.

It is applied when a model is built or switched, where its class is known, and when a mask is made, where its
configuration is known.
"""

import functools
from collections.abc import Callable, Iterator
from inspect import isclass, isfunction, unwrap
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from fa_ops.integrations.huggingface_pattern import ATTENTION_NAME

LIBRARY_MODULES = (nn.Module.__module__, "transformers.modeling_utils", "transformers.generation.utils")
INTERFACE = {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation"}
MASKING_MODULE = "transformers.masking_utils"
MASK_PREFIX = "create_"  # of the functions there that make masks for attention
RECURRENT_MASK = "create_recurrent_attention_mask"  # (B, K), of layers that are no attention
SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention", "MultiheadAttention"}
MASKS = {"mask", "attn_mask", "attention_mask"}
# They name parts of all models of their file, of whatever configuration.
NOT_LOOKED_AT = {"_init_weights"}
CHOOSES_KEYS = "Indexer"  # so ends the name of a part that scores keys, with the mask, to attend to the best of them
# They have a mask and a softmax, and were looked at: it is no mask of the mask function.
HARMLESS = (
    "MultiscaleDeformableAttention", "MHAttentionMap", "EvollaSequenceCompressorAttention", "MiniMaxM3VLIndexer",
    "Phi4MultimodalVisionMultiheadAttentionPoolingHead",
)  # fmt: skip
# They declare no implementation but eager, and `make test-families` has found them right.
PROVEN = (
    "align", "clap", "nllb_moe", "speech_to_text", "splinter", "time_series_transformer"
)  # fmt: skip
# They declare that they support sdpa, and work on the mask tensor themselves.
CHANGES_MASKS = {
    "LightGlueForKeypointMatching": "exchanges the masks of two images",
    "DogeModel": "makes a mask in floating point of its own from the one that it gets",
    "T5Gemma2Decoder": "joins the masks of self- and cross-attention",
}

GUARDED = "_fa_ops_guarded"  # of the method of Transformers that asks us

_vouched: set[type] = set()
_admitted: set[type] = set()


class Parts(NamedTuple):
    """What the classes that a model is built of do about attention, by their names."""

    callers: frozenset[str] = frozenset()
    own_attention: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    makes_masks: bool = False


def vouch_for(model_class: type) -> None:
    """Says that a model class works with `modelopt_triton`, whatever its code looks like.

    The caller answers for two things: every attention of the model that takes a mask calls Transformers' attention
    interface (`ALL_ATTENTION_FUNCTIONS`), and the model hands the masks on as it got them.

    Args:
        model_class: a subclass of `transformers.PreTrainedModel`, or a configuration class, which stands for all models
            that have it.

    Raises TypeError for what is no class.
    """
    if not isclass(model_class):
        raise TypeError(f"model_class: {model_class!r} given; expected a model or configuration class")
    _vouched.add(model_class)


def check_model_class(model_class: type) -> None:
    """Raises NotImplementedError, by name, for a class that may not have our attention."""
    reason = refusal(model_class)
    if reason is not None:
        raise NotImplementedError(f"{reason}; {_how_to_vouch(model_class)}")


def check_config(config: Any) -> None:
    """Raises NotImplementedError, by name, unless the models of a configuration will call our attention function."""
    reason = _refusal_of_config(type(config))
    if reason is not None:
        raise NotImplementedError(reason)


@torch.compiler.assume_constant_result
def _refusal_of_config(config_class: type) -> str | None:
    if config_class in _admitted:
        return None
    models = _models_of(config_class)
    if _vouched.isdisjoint([config_class, *models]):
        if not models:
            return (
                f"{config_class.__name__}: no model class with this configuration is known, so nobody can tell whether "
                f"it calls {ATTENTION_NAME}; {_how_to_vouch(config_class)}"
            )
        for model_class in models:
            if (reason := refusal(model_class)) is not None:
                return f"{reason}; {_how_to_vouch(model_class)}"
        if not any(parts_of(model_class, with_models=True).callers for model_class in models):
            return (
                f"{models[0].__name__}: none of its parts calls Transformers' attention interface, which "
                f"{ATTENTION_NAME} needs; {_how_to_vouch(models[0])}"
            )
    _admitted.add(config_class)
    return None


def _how_to_vouch(cls: type) -> str:
    return (
        f'use attn_implementation="sdpa" or "eager"; if it does work with {ATTENTION_NAME}, say so with '
        f"fa_ops.vouch_for({cls.__name__})"
    )


def _models_of(config_class: type) -> list[type]:
    """The model classes that declare a configuration class, or else the nearest class that it inherits from: those
    in its own package, if there are any. All models of its package if none declares it."""
    from transformers import PreTrainedModel

    known = list(_subclasses(PreTrainedModel))
    for base in config_class.__mro__:
        models = [model for model in known if getattr(model, "config_class", None) is base]
        if models:
            return [model for model in models if _package(model) == _package(base)] or models
    return [model for model in known if _package(model) == _package(config_class)]


def _package(cls: type) -> str:
    return cls.__module__.rpartition(".")[0]


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def refusal(model_class: type) -> str | None:
    """Why a model class may not have our attention, None if it may."""
    if model_class in _vouched:
        return None
    name, parts = model_class.__name__, parts_of(model_class)
    if name in CHANGES_MASKS:
        return f"{name}: it {CHANGES_MASKS[name]}, which {ATTENTION_NAME} does not support"
    if parts.tables:
        return (
            f"{name}: it takes its attention from a table of its own ({', '.join(sorted(parts.tables))}), which has "
            f"no entry for {ATTENTION_NAME}"
        )
    if parts.makes_masks and parts.own_attention:
        return (
            f"{name}: {', '.join(sorted(parts.own_attention))} computes attention itself, without Transformers' "
            f"attention interface, from masks that {ATTENTION_NAME} alone can read"
        )
    supports = any(getattr(model_class, f"_supports_{kind}", False) for kind in ("sdpa", "flash_attn", "flex_attn"))
    if parts.makes_masks and parts.callers and not supports and not _is_proven(model_class):
        return (
            f"{name}: it declares support for neither sdpa nor flash nor flex attention, so what it does to its masks "
            f"is known to eager attention alone"
        )
    return None


def _is_proven(model_class: type) -> bool:
    return model_class.__module__.startswith(tuple(f"transformers.models.{package}." for package in PROVEN))


@functools.cache
def parts_of(model_class: type, with_models: bool = False) -> Parts:
    """Looks at a model class and at every class that its code names. The parts of other models are left out unless
    `with_models`: these are asked about when they are built."""
    from transformers import PreTrainedModel

    callers, own_attention, tables, makes_masks = set(), set(), set(), False
    waiting, seen = [model_class], {model_class}
    while waiting:
        part = waiting.pop()
        named = {function: _named(function) for function in _functions(part)}
        uses_softmax = any(SOFTMAX & names for names in named.values())
        if any(names >= INTERFACE for names in named.values()):
            callers.add(part.__name__)
        elif (
            part is not model_class
            and _takes_mask(part)
            and not part.__name__.endswith(HARMLESS)
            and (uses_softmax or part.__name__.endswith(CHOOSES_KEYS))
        ):
            own_attention.add(part.__name__)
        for function, names in named.items():
            for name in names:
                value = function.__globals__.get(name)
                makes_masks |= _is_mask_maker(value)
                found = list(value.values()) if isinstance(value, dict) else [value]
                if isinstance(value, dict) and "eager" in value and ATTENTION_NAME not in value:
                    tables.add(name)
                for cls in found:
                    if isclass(cls) and issubclass(cls, nn.Module) and cls not in seen:
                        seen.add(cls)
                        if with_models or not issubclass(cls, PreTrainedModel):
                            waiting.append(cls)
    return Parts(frozenset(callers), frozenset(own_attention), frozenset(tables), makes_masks)


def _is_mask_maker(value: Any) -> bool:
    name = getattr(value, "__name__", "")
    return (
        getattr(value, "__module__", None) == MASKING_MODULE and name.startswith(MASK_PREFIX) and name != RECURRENT_MASK
    )


def calls_interface(module_class: type) -> bool:
    """Whether the code of a class itself calls Transformers' attention interface."""
    return any(_named(function) >= INTERFACE for function in _functions(module_class))


def _functions(module_class: type) -> Iterator[FunctionType]:
    # PreTrainedModel names the interface, too, to check implementations
    for base in module_class.__mro__:
        if base.__module__ not in LIBRARY_MODULES:
            members = ((name, value) for name, value in vars(base).items() if name not in NOT_LOOKED_AT)
            yield from (unwrap(value) for _, value in members if isfunction(value))


def _named(function: FunctionType) -> frozenset[str]:
    """Names of globals and attributes in a function's code, functions inside it included."""
    return _names_in(function.__code__)


@functools.cache
def _names_in(code: CodeType) -> frozenset[str]:
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _takes_mask(module_class: type) -> bool:
    codes = (function.__code__ for function in _functions(module_class))
    return any(MASKS & set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) for code in codes)


def guard_models() -> None:
    """Makes Transformers ask `check_model_class` when a model is built for, or switched to, our attention.

    Transformers has no place to say which models a registered name is for. Without this, a model with a table of its
    own ends in a KeyError, and others run their own attention without a word.
    """
    from transformers import PreTrainedModel

    checked = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(checked, GUARDED):
        PreTrainedModel.get_correct_attn_implementation = _with_check(checked)


def _with_check(choose: Callable) -> Callable:
    @functools.wraps(choose)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention == ATTENTION_NAME:
            check_model_class(type(self))
        return choose(self, requested_attention, *args, **kwargs)

    setattr(get_correct_attn_implementation, GUARDED, True)
    return get_correct_attn_implementation
