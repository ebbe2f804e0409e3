"""The mask function of `attn_implementation="modelopt_triton"`: what a model wants of its mask, as a few key masks.

Transformers describes a mask as a function of row, head, query and key, made of intersections and unions of closures
of its own. Materialised it is (B, 1, Q, K). Here its closures are read. Those that the op knows become the mask's
pattern, padding becomes a state of each key, and all others are refused by name. `huggingface_pattern` says how the
tensor holds both.

Shapes are B rows, Q query positions, K key positions.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa_ops.integrations.huggingface_guard import check_config
from fa_ops.integrations.huggingface_pattern import (
    ATTENTION_NAME,
    CENTRED,
    NO_WINDOW,
    SLIDING,
    KeyStates,
    MaskPattern,
    describe,
    hand_out,
    make_mask,
)

MaskFunction = Callable[[Any, Any, Any, Any], Any]
MASKING_FILES = ("transformers/masking_utils.py", "transformers\\masking_utils.py")
INTERSECTION, UNION = "and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"


def triton_attention_mask(*, config: Any = None, **arguments: Any) -> Tensor | None:
    """A mask that `huggingface_pattern.read_mask` reads; None where every query sees every key and the model itself
    allows None for that.

    Transformers calls it through AttentionMaskInterface, with the arguments of `_make_mask`. Raises
    NotImplementedError, by name, unless the models of `config` will call our attention function, and as `_make_mask`
    does.
    """
    if config is not None:
        check_config(config)
    mask = _make_mask(config=config, **arguments)
    return mask if mask is None or torch.compiler.is_compiling() else hand_out(mask, config)


def _make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **hints_for_other_backends: Any,
) -> Tensor | None:
    """What `triton_attention_mask` returns.

    `q_offset` (a 0-d tensor with a static cache) and `kv_offset`
    are the positions of the first query and of the first key; `attention_mask` is (B, number of positions so far).

    A window is counted only if some key may lie outside. Queries stand at the end of the keys, unless a static cache
    has room behind them for keys to come; these keys are not written yet. A causal mask is never None, since not all
    models take None for causal attention.

    Raises NotImplementedError, naming what `mask_function` asks for that the op does not know, and ValueError for a
    window that is not the configuration's.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            f"attention_mask: {describe(attention_mask)} given; {ATTENTION_NAME} accepts (B, number of positions)"
        )
    from transformers.utils.import_utils import is_tracing

    is_plain = _leaf_name(mask_function) in PLAIN  # without captured variables, which dynamo hides
    queries = None if is_plain else torch.arange(q_length, device=device) + q_offset
    if queries is not None and is_tracing(queries):
        # Transformers' functions for bidirectional masks, and they alone, give this hint.
        is_bidirectional = "allow_is_bidirectional_skip" in hints_for_other_backends
        is_packable = attention_mask is None and q_length == kv_length and not is_bidirectional
        wanted = _traced(mask_function, batch_size, queries, kv_offset, local_size, use_vmap, is_bidirectional)
        if not is_packable:
            wanted = wanted._replace(document_starts=None)
    else:
        wanted = _walk(mask_function)
    # a length that is not known yet may be a longer one when the graph runs
    window = NO_WINDOW if statically_known_true(kv_length <= wanted.sliding_window) else wanted.window
    if window != NO_WINDOW:
        _check_window(wanted.sliding_window, config)
    last_key = q_offset - kv_offset + q_length - 1
    to_mask: Any = {"q_length": q_length, "kv_length": kv_length, "last_key": last_key, "device": device}

    masks = [_at_keys(mask, kv_length, kv_offset) for mask in (attention_mask, *wanted.padding) if mask is not None]
    if wanted.document_starts is not None:
        if masks:
            raise _unsupported_leaf("packed_sequence_mask_function", "with padding")
        pattern = MaskPattern(wanted.is_causal, window, is_packed=True)
        return make_mask(pattern, KeyStates(wanted.document_starts), **to_mask)
    has_room = q_length != kv_length and (isinstance(last_key, Tensor) or last_key != kv_length - 1)
    if has_room and window != NO_WINDOW and not wanted.is_causal:
        raise _unsupported_leaf("sliding_window_bidirectional_overlay", "over a static cache")
    written = None
    if has_room and wanted.is_causal:
        written = (torch.arange(kv_length, device=device) <= last_key).expand(batch_size, kv_length)
        masks.append(written)
    pattern = MaskPattern(wanted.is_causal, window, hides_keys=len(masks) > 0)
    if masks:
        return make_mask(pattern, KeyStates(reduce(torch.logical_and, masks), written), **to_mask)
    if not pattern.is_aligned and hints_for_other_backends.get("allow_is_bidirectional_skip", False):
        return None
    return make_mask(pattern, KeyStates(None), **to_mask)


def _at_keys(mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The (B, K) part of a mask over positions that belongs to the keys; those beyond its end are masked."""
    beyond = kv_offset + kv_length - mask.shape[1]
    if beyond > 0:
        mask = nn.functional.pad(mask, (0, beyond))
    return mask[:, kv_offset : kv_offset + kv_length].bool()


def _check_window(sliding_window: int, config: Any) -> None:
    """The attention function knows the kind of the window from the mask, and its size from the configuration."""
    try:
        configured = getattr(config, "sliding_window", None)
    except RuntimeError:  # Transformers' answer where layers have windows of several sizes
        configured = "not one for all layers"
    if configured != sliding_window:
        raise ValueError(
            f"mask_function: a window of {sliding_window} given, config.sliding_window is {configured} "
            f"({getattr(config, 'model_type', 'no configuration')}); {ATTENTION_NAME} accepts equal ones"
        )


class Wanted(NamedTuple):
    """What a mask function asks for."""

    is_causal: bool = False
    window: int = NO_WINDOW
    sliding_window: int = 0
    padding: tuple[Tensor, ...] = ()
    document_starts: Tensor | None = None  # (B, S) bool


PLAIN = ("causal_mask_function", "bidirectional_mask_function")


def _walk(mask_function: MaskFunction) -> Wanted:
    wanted = Wanted()
    for name, captured in _leaves(mask_function):
        match name:
            case "causal_mask_function":
                wanted = wanted._replace(is_causal=True)
            case "bidirectional_mask_function":
                pass
            case "padding_mask_function.<locals>.inner_mask":
                wanted = wanted._replace(padding=(*wanted.padding, captured["padding_mask"]))
            case "sliding_window_overlay.<locals>.inner_mask":
                wanted = _with_window(wanted, SLIDING, captured["sliding_window"])
            case "sliding_window_bidirectional_overlay.<locals>.inner_mask":
                wanted = _with_window(wanted, SLIDING, captured["sliding_window"])
            case "T5Gemma-2: sliding_window_mask_function.<locals>.inner_mask" if not captured["is_causal"]:
                wanted = _with_window(wanted, CENTRED, captured["sliding_window"])
            case "packed_sequence_mask_function.<locals>.inner_mask":
                document = captured["packed_sequence_mask"]
                is_start = nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
                wanted = wanted._replace(document_starts=is_start)
            case _:
                values = ", ".join(f"{key}={value}" for key, value in captured.items() if isinstance(value, int))
                raise _unsupported_leaf(name, values)
    return wanted


def _with_window(wanted: Wanted, window: int, sliding_window: int) -> Wanted:
    if wanted.window != NO_WINDOW:
        raise _unsupported_leaf("two windows", f"{wanted.sliding_window} and {sliding_window}")
    return wanted._replace(window=window, sliding_window=sliding_window)


def _leaves(mask_function: MaskFunction) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and captured variables of every function that an intersection is made of."""
    name = _leaf_name(mask_function)
    captured = inspect.getclosurevars(mask_function).nonlocals if inspect.isfunction(mask_function) else {}
    if name == INTERSECTION:
        for part in captured["mask_functions"]:
            yield from _leaves(part)
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # Beside the documents' borders, which are a leaf of their own. Within one, distances stay what they were.
        yield from _leaves(captured["mask_function"])
    elif name == UNION:
        raise _unsupported_leaf(" | ".join(_leaf_name(part) for part in captured["mask_functions"]), "")
    else:
        yield name, captured


def _leaf_name(mask_function: MaskFunction) -> str:
    """The name of one of Transformers' own functions; of all others with the file that they are from, so that nobody is
    taken for somebody else of the same name."""
    # dynamo of torch 2.11 knows no __qualname__ and no __module__
    code = getattr(mask_function, "__code__", None)
    if code is None:
        return repr(mask_function)
    if code.co_filename.endswith(MASKING_FILES):
        return code.co_qualname
    if code.co_filename.endswith("modeling_t5gemma2.py"):
        return f"T5Gemma-2: {code.co_qualname}"
    return f"{code.co_qualname} of {code.co_filename}"


def _unsupported_leaf(name: str, values: str) -> NotImplementedError:
    return NotImplementedError(
        f"mask_function: {name} ({values}) hides or shows keys in a way that {ATTENTION_NAME} does not support; it "
        "supports causal_mask_function, bidirectional_mask_function, sliding windows, packed sequences and padding"
    )


def _traced(
    mask_function: MaskFunction,
    batch_size: int,
    queries: Tensor,
    kv_offset: int,
    local_size: int | None,
    use_vmap: bool,
    is_bidirectional: bool,
) -> Wanted:
    """What a function whose closures cannot be read must be asking for, and an assertion on the device that it does.

    Of Transformers' own functions an intersection without `use_vmap` is a causal or a bidirectional one with a window
    of `local_size`, or either with packed sequences. While tracing it takes every batch with neither a mask nor a cache
    for packed, because it cannot look at position_ids. So the values decide when the graph runs, in time and memory
    linear in the length.
    """
    name = _leaf_name(mask_function)
    if name != INTERSECTION or use_vmap:
        raise _unsupported_leaf(name, "while tracing")
    rows, head = torch.arange(batch_size, device=queries.device)[:, None], torch.zeros_like(queries[:1])

    def sees(distance: int) -> Tensor:
        """(B, Q) whether queries see the key at a distance from them; False where that is no query's position."""
        # without a slice, whose size could be 1 for which torch.compile would make a frame of its own
        keys, first, last = queries + distance, queries[0], queries[-1]
        seen = mask_function(rows, head, queries[None], torch.clamp(keys, first, last)[None])
        return seen.expand(batch_size, -1) & (keys >= first) & (keys <= last)

    is_as_assumed = sees(0).all()
    if not is_bidirectional:
        is_as_assumed = is_as_assumed & ~sees(1).any()
    if local_size is not None:
        is_as_assumed = is_as_assumed & ~sees(-local_size - is_bidirectional).any()
    torch._assert_async(
        is_as_assumed,
        f"{ATTENTION_NAME}: the mask is not that of causal or bidirectional attention with a window of {local_size}",
    )
    window, size = (NO_WINDOW, 0) if local_size is None else (SLIDING, local_size)
    return Wanted(not is_bidirectional, window, size, document_starts=~sees(-1))
