"""The mask function of `attn_implementation="modelopt_triton"`: what a model wants of its mask, as a key mask.

Transformers describes a mask as a function of row, head, query and key, made of intersections and unions of closures
of its own. Materialised it is (B, 1, Q, K). Here its closures are read, those that the op knows become arguments of
the op, padding becomes (B, 1, 1, K), and all others are refused by name.

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
    **_hints_for_other_backends: Any,
) -> Tensor | None:
    """The keys that padding and a static cache leave visible: bool (B, 1, 1, K), or None where all are.

    Transformers calls it through AttentionMaskInterface. `q_offset` (a 0-d tensor with a static cache) and `kv_offset`
    are the positions of the first query and of the first key; `attention_mask` is (B, number of positions so far).

    Causality is not in the mask, the op sees to it. For that it must know where the queries stand among the keys. That
    is at their end, unless several queries stand before the room that a static cache has for keys to come: then the
    mask is (B, 2, 1, K), and [:, 1] is True up to the last query's key.

    Raises NotImplementedError, naming what `mask_function` asks for beside a causal or a bidirectional pattern.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            f"attention_mask: {describe(attention_mask)} given; {ATTENTION_NAME} accepts (B, number of positions)"
        )
    queries = torch.arange(q_length, device=device) + q_offset
    pattern = _mask_pattern(mask_function, batch_size, queries, kv_length, kv_offset, local_size, use_vmap)

    masks = [_at_keys(mask, kv_length, kv_offset) for mask in (attention_mask, *pattern.padding) if mask is not None]
    last_key = q_offset - kv_offset + q_length - 1
    if pattern.is_causal and q_length != kv_length and (isinstance(last_key, Tensor) or last_key != kv_length - 1):
        written = (torch.arange(kv_length, device=device) <= last_key).expand(batch_size, kv_length)
        masks.append(written)
        if q_length != 1:
            return torch.stack((reduce(torch.logical_and, masks), written), dim=1)[:, :, None, :]
    return reduce(torch.logical_and, masks)[:, None, None, :] if masks else None


def _at_keys(mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The (B, K) part of a mask over positions that belongs to the keys; those beyond its end are masked."""
    beyond = kv_offset + kv_length - mask.shape[1]
    if beyond > 0:
        mask = nn.functional.pad(mask, (0, beyond))
    return mask[:, kv_offset : kv_offset + kv_length].bool()


class MaskPattern(NamedTuple):
    is_causal: bool
    padding: tuple[Tensor, ...] = ()


def _mask_pattern(
    mask_function: MaskFunction,
    batch_size: int,
    queries: Tensor,
    kv_length: int,
    kv_offset: int,
    local_size: int | None,
    use_vmap: bool,
) -> MaskPattern:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
    from transformers.utils.import_utils import is_tracing

    if mask_function is causal_mask_function:
        return MaskPattern(is_causal=True)
    if mask_function is bidirectional_mask_function:
        return MaskPattern(is_causal=False)
    if not is_tracing(queries):
        return _walk(mask_function, kv_length)
    # dynamo hides a closure's contents. And while it traces, Transformers asks for packed sequences whenever there is
    # neither a mask nor a cache, because it cannot look at position_ids. So the values decide when the graph runs.
    if local_size is not None and kv_length > local_size:
        raise _unsupported_leaf("sliding_window_overlay or chunked_overlay", f"local_size={local_size}")
    name = _leaf_name(mask_function)
    if name != INTERSECTION or use_vmap:
        raise _unsupported_leaf(name, "while tracing")
    _assert_only_causal(mask_function, batch_size, queries, kv_offset)
    return MaskPattern(is_causal=True)


def _walk(mask_function: MaskFunction, kv_length: int) -> MaskPattern:
    is_causal, padding = False, []
    for name, captured in _leaves(mask_function):
        match name:
            case "causal_mask_function":
                is_causal = True
            case "bidirectional_mask_function":
                pass
            case "padding_mask_function.<locals>.inner_mask":
                padding.append(captured["padding_mask"])
            case "sliding_window_overlay.<locals>.inner_mask" if kv_length <= captured["sliding_window"]:
                pass
            case "sliding_window_bidirectional_overlay.<locals>.inner_mask" if kv_length <= captured["sliding_window"]:
                pass
            case _:
                values = ", ".join(f"{key}={value}" for key, value in captured.items() if isinstance(value, int))
                raise _unsupported_leaf(name, values)
    return MaskPattern(is_causal, tuple(padding))


def _leaves(mask_function: MaskFunction) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and captured variables of every function that an intersection is made of."""
    name = _leaf_name(mask_function)
    captured = inspect.getclosurevars(mask_function).nonlocals if inspect.isfunction(mask_function) else {}
    if name == INTERSECTION:
        for part in captured["mask_functions"]:
            yield from _leaves(part)
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
        f"mask_function: {name} ({values}) hides or shows keys in a way that {ATTENTION_NAME} does not support yet; "
        "it supports causal_mask_function, bidirectional_mask_function, padding, and windows with room for every key"
    )


def _assert_only_causal(mask_function: MaskFunction, batch_size: int, queries: Tensor, kv_offset: int) -> None:
    """Stops the device, without the host waiting for it, where `mask_function` is not plainly causal.

    Every query must see itself and the first key and not the next key, in time and memory linear in the length.
    """
    rows, head = torch.arange(batch_size, device=queries.device)[:, None], torch.zeros_like(queries[:1])
    queries = queries[None, :]
    sees_itself = mask_function(rows, head, queries, queries).all()
    sees_first = mask_function(rows, head, queries, torch.full_like(queries, kv_offset)).all()
    sees_next = mask_function(rows, head, queries[:, :-1], queries[:, 1:]).any()
    torch._assert_async(
        sees_itself & sees_first & ~sees_next,
        f"{ATTENTION_NAME}: the mask is not plainly causal (packed sequences?), which is not supported yet",
    )


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
