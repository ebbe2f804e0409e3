"""The mask function of `attn_implementation="modelopt_triton"`: what a model wants of its mask, as a key mask.

Transformers describes a mask as a function of row, head, query and key, made of intersections and unions of closures
of its own. Materialised it is (B, 1, Q, K). Here its closures are read, those that the op knows become arguments of
the op, padding becomes (B, pattern, 1, K), and all others are refused by name.

A mask is a tensor to whoever carries it from here to the attention function: models keep one for each type of layer,
`generate` makes it before the model is called, and copies it, and hooks move it between devices. What survives all of
that, at the cost of a few bytes and without being read back from a device, is its shape. So the size of the dimension
for the heads, which this mask has no other use for, is the number of the pattern.

Shapes are B rows, Q query positions, K key positions.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ATTENTION_NAME = "modelopt_triton"

MaskFunction = Callable[[Any, Any, Any, Any], Any]
INTERSECTION, UNION = "and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"

# Kinds of windows. Of W = config.sliding_window, a sliding one shows keys less than W before a query if causal, and up
# to W before and behind it if not; a centred one shows W keys around it.
NO_WINDOW, SLIDING, CENTRED = range(3)


class MaskPattern(NamedTuple):
    """What a mask tells beside padding. `is_packed`: it is True not for the keys to see, but where documents begin."""

    is_causal: bool
    window: int = NO_WINDOW
    is_packed: bool = False

    @property
    def number(self) -> int:
        return 1 + self.window + 3 * self.is_causal + 6 * self.is_packed

    @classmethod
    def of(cls, attention_mask: Tensor) -> "MaskPattern":
        # compared, not computed: while tracing, the size may be symbolic, and what follows from it must not be
        for number, pattern in PATTERNS.items():
            if attention_mask.shape[1] == number:
                return pattern
        raise ValueError(f"attention_mask: size {attention_mask.shape[1]} of dimension 1 is no pattern's number")

    def window_size(self, sliding_window: int) -> tuple[int, int]:
        """Keys that a query sees before and behind its own position."""
        if self.window == NO_WINDOW:
            return -1, -1
        if self.window == CENTRED:
            return (sliding_window - 1) // 2, sliding_window // 2
        return (sliding_window - 1, 0) if self.is_causal else (sliding_window, sliding_window)


PATTERNS = {
    pattern.number: pattern
    for pattern in (
        MaskPattern(is_causal, window, is_packed)
        for is_packed in (False, True)
        for is_causal in (False, True)
        for window in range(3)
    )
}
NUM_PATTERNS = len(PATTERNS)


def triton_attention_mask(
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
    """The keys that padding and a static cache leave visible, bool (B, pattern, 1, K); None where all are and nothing
    but causality is to be told.

    Transformers calls it through AttentionMaskInterface. `q_offset` (a 0-d tensor with a static cache) and `kv_offset`
    are the positions of the first query and of the first key; `attention_mask` is (B, number of positions so far).

    - pattern is the number of a `MaskPattern`. A window is counted only if some key may lie outside.
    - A pattern alone, with no key hidden, is (1, pattern, 1, 1).
    - Queries stand at the end of the keys, unless several queries stand before the room that a static cache has for
      keys to come: then the mask is (B, pattern, 2, K), and [:, :, 1] is True up to the last query's key.
    - Of packed sequences it is (B, pattern, 1, K), and True where a document begins.

    Raises NotImplementedError, naming what `mask_function` asks for that the op does not know, and ValueError for a
    window that is not the configuration's.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            f"attention_mask: {describe(attention_mask)} given; {ATTENTION_NAME} accepts (B, number of positions)"
        )
    queries = torch.arange(q_length, device=device) + q_offset
    if _is_tracing(mask_function, queries):
        # Transformers' functions for bidirectional masks, and they alone, give this hint.
        is_bidirectional = "allow_is_bidirectional_skip" in hints_for_other_backends
        is_packable = attention_mask is None and q_length == kv_length and not is_bidirectional
        wanted = _traced(mask_function, batch_size, queries, kv_offset, local_size, use_vmap, is_bidirectional)
        if not is_packable:
            wanted = wanted._replace(document_starts=None)
    else:
        wanted = _walk(mask_function)
    window = wanted.window if kv_length > wanted.sliding_window else NO_WINDOW
    if window != NO_WINDOW:
        _check_window(wanted.sliding_window, config)
    pattern = MaskPattern(wanted.is_causal, window, wanted.document_starts is not None)

    masks = [_at_keys(mask, kv_length, kv_offset) for mask in (attention_mask, *wanted.padding) if mask is not None]
    if wanted.document_starts is not None:
        if masks:
            raise _unsupported_leaf("packed_sequence_mask_function", "with padding")
        return _with_number(wanted.document_starts[:, None], pattern)
    last_key = q_offset - kv_offset + q_length - 1
    has_room = q_length != kv_length and (isinstance(last_key, Tensor) or last_key != kv_length - 1)
    if has_room and window != NO_WINDOW and not pattern.is_causal:
        raise _unsupported_leaf("sliding_window_bidirectional_overlay", "over a static cache")
    if has_room and pattern.is_causal:
        written = (torch.arange(kv_length, device=device) <= last_key).expand(batch_size, kv_length)
        masks.append(written)
        if q_length != 1:
            return _with_number(torch.stack((reduce(torch.logical_and, masks), written), dim=1), pattern)
    if masks:
        return _with_number(reduce(torch.logical_and, masks)[:, None], pattern)
    return None if window == NO_WINDOW else _with_number(torch.ones(1, 1, 1, dtype=torch.bool, device=device), pattern)


def _with_number(mask: Tensor, pattern: MaskPattern) -> Tensor:
    """(B, channels, K) to (B, pattern, channels, K), without a copy."""
    return mask[:, None].expand(-1, pattern.number, -1, -1)


def _at_keys(mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The (B, K) part of a mask over positions that belongs to the keys; those beyond its end are masked."""
    beyond = kv_offset + kv_length - mask.shape[1]
    if beyond > 0:
        mask = nn.functional.pad(mask, (0, beyond))
    return mask[:, kv_offset : kv_offset + kv_length].bool()


def _check_window(sliding_window: int, config: Any) -> None:
    """The attention function knows the kind of the window from the mask, and its size from the configuration."""
    configured = getattr(config, "sliding_window", None)
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


def _is_tracing(mask_function: MaskFunction, queries: Tensor) -> bool:
    """dynamo hides a closure's contents."""
    from transformers.utils.import_utils import is_tracing

    return is_tracing(queries) and _leaf_name(mask_function) not in PLAIN


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
            case "sliding_window_mask_function.<locals>.inner_mask" if not captured["is_causal"]:  # of T5Gemma-2
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
    # dynamo of torch 2.11 knows no __qualname__.
    code = getattr(mask_function, "__code__", None)
    return repr(mask_function) if code is None else code.co_qualname


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


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
