"""Attention for Hugging Face Transformers: `attn_implementation="modelopt_triton"`.

Transformers calls two functions. The mask function (huggingface_mask.py) turns what a model wants of its mask into a
key mask (B, 1, 1, K), once per forward or, under `generate` with a static cache, before it. The attention function gets
that mask in every layer, computes on the device where each sequence begins and ends, and calls the op on the padded
layout, so that the keys and values of a cache are read where they lie.

Shapes are B rows, Q query positions, K key positions, Hq query heads, Hkv key and value heads, head dimensions D, Dv.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fa_ops.attention import attention
from fa_ops.integrations.huggingface_mask import ATTENTION_NAME, describe, triton_attention_mask
from fa_ops.varlen import from_mask

# Arguments that change what attention means, and where the model has them from.
UNSUPPORTED_ARGUMENTS = {
    "softcap": "config.attn_logit_softcapping",
    "s_aux": "attention sinks, a parameter of the module",
    "sinks": "attention sinks, a parameter of the module",
    "position_bias": "a bias that is added to the scores",
    "indices": "sparse attention with an indexer, config.index_topk",
    "block_indices": "sparse attention with an indexer, config.index_topk_blocks",
    "cu_seq_lens_q": "packed sequences, from the data collator",
    "cu_seq_lens_k": "packed sequences, from the data collator",
    "max_length_q": "packed sequences, from the data collator",
    "max_length_k": "packed sequences, from the data collator",
    "seq_idx": "packed sequences, from the data collator",
    "cache": "the paged cache of continuous batching",
    "output_attentions": 'config.output_attentions; attn_implementation="eager" returns attention weights',
}

# What else travels with a model's keyword arguments, and has no effect on attention. `position_ids` and
# `sliding_window` are here because they are checked on their own.
ARGUMENTS_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    }
)

DROPOUT_FIELDS = ("attention_dropout", "attention_probs_dropout_prob", "attn_dropout", "attn_pdrop", "dropout")


def register_triton_attention() -> bool:
    """Makes `attn_implementation="modelopt_triton"` known to Transformers; needs neither CUDA nor Triton.

    Returns True. Registering again changes nothing; somebody else's function under the name is replaced with a
    UserWarning. Raises ImportError where Transformers is missing, or too old to have both interfaces.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_triton_attention() needs Hugging Face Transformers 5.17 or newer: "
            'pip install "transformers>=5.17"'
        ) from error
    _register(AttentionInterface, triton_attention_forward)
    # A name that AttentionMaskInterface does not know gets no mask at all, padding or not.
    _register(AttentionMaskInterface, triton_attention_mask)
    return True


def _register(interface: Any, function: Callable) -> None:
    present = interface().get(ATTENTION_NAME)
    if present is function:
        return
    if present is not None:
        warnings.warn(
            f"{interface.__name__}: {ATTENTION_NAME!r} was {_full_name(present)}; now it is {_full_name(function)}",
            stacklevel=3,
        )
    interface.register(ATTENTION_NAME, function)


def triton_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers' models call it, through `fa_ops.attention`; nothing is copied, the host never waits.

    query (B, Hq, Q, D), key (B, Hkv, K, D), value (B, Hkv, K, Dv), attention_mask None or what `triton_attention_mask`
    returns, scaling 1/√D by default. `is_causal` defaults to the module's own.

    Returns the output (B, Q, Hq, Dv) and None for the attention weights. The output is 0 for queries that see no key,
    such as left padding, and with `module.training` for right padding too, which then costs nothing: leave padding out
    of the loss, with labels of -100.

    Raises NotImplementedError or ValueError, naming module, argument and configuration field, for what is not
    supported, and TypeError for arguments that it does not know.
    """
    _check_arguments(module, attention_mask, query, key, dropout, kwargs)
    if is_causal is None:
        is_causal = _is_causal_of(module)
    if is_causal and attention_mask is None:
        _assert_not_packed(kwargs.get("position_ids"))
    ranges = _ranges(query, key, attention_mask, is_causal, module.training)
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        ranges.b_start_loc,
        ranges.b_seq_len,
        is_causal=is_causal,
        softmax_scale=scaling,
        b_start_loc_k=ranges.b_start_loc_k,
        b_seq_len_k=ranges.b_seq_len_k,
        key_mask=None if attention_mask is None else attention_mask[:, 0, 0, :],
    )
    return cast(Tensor, out), None


class Ranges(NamedTuple):
    """Start and length of each row's queries, (B,) int32; of its keys too, unless they are the same."""

    b_start_loc: Tensor
    b_seq_len: Tensor
    b_start_loc_k: Tensor | None = None
    b_seq_len_k: Tensor | None = None


def _ranges(query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool, is_training: bool) -> Ranges:
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    start = torch.zeros(batch, dtype=torch.int32, device=query.device)
    length = torch.full_like(start, q_length)
    if attention_mask is None:
        if q_length == kv_length:
            return Ranges(start, length)
        return Ranges(start, length, start, torch.full_like(start, kv_length))

    start_k, length_k = from_mask(attention_mask[:, 0, 0, :])
    if not is_causal:
        # The keys' padding says nothing of the queries, not even where Q is K: this may be cross-attention.
        return Ranges(start, length, start_k, length_k)
    if q_length == kv_length and is_training:
        return Ranges(start_k, length_k)
    if q_length != 1:
        # The op aligns the ends of both ranges, so the keys' has to end at the last query, even if that is padding. A
        # single query sees all that is visible, so its keys need not go further.
        has_room = attention_mask.shape[1] == 2
        end_k = attention_mask[:, 1, 0, :].sum(-1, dtype=torch.int32) if has_room else kv_length
        length_k = end_k - start_k
    start = (q_length - length_k).clamp(min=0)
    return Ranges(start, q_length - start, start_k, length_k)


def _assert_not_packed(position_ids: Tensor | None) -> None:
    """Stops the device where positions restart within a row: those are packed sequences, which no mask separates."""
    if position_ids is None or position_ids.ndim > 2 or position_ids.shape[-1] == 1:
        return
    torch._assert_async(
        (position_ids[..., 1:] > position_ids[..., :-1]).all(),
        f"{ATTENTION_NAME}: position_ids restart within a row (packed sequences), which is not supported yet; "
        "pad the sequences and pass an attention_mask",
    )


def _is_causal_of(module: nn.Module) -> bool:
    is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        raise ValueError(
            f"{_owner(module)}: is_causal was not given and the module has none; {ATTENTION_NAME} accepts True or "
            "False and never guesses it from the lengths"
        )
    return is_causal


def _check_arguments(
    module: nn.Module,
    attention_mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    if dropout > 0 and module.training:
        field = next((name for name in DROPOUT_FIELDS if getattr(_config(module), name, None) == dropout), None)
        raise NotImplementedError(
            f"{_owner(module)}: dropout={dropout} in training is not supported; set "
            f"config.{field or DROPOUT_FIELDS[0]} to 0"
        )
    for name, given in kwargs.items():
        if name in ARGUMENTS_WITHOUT_EFFECT or given is None or given is False:
            continue
        if name in UNSUPPORTED_ARGUMENTS:
            raise NotImplementedError(
                f"{_owner(module)}: {name} ({UNSUPPORTED_ARGUMENTS[name]}) is not supported by {ATTENTION_NAME}"
            )
        raise TypeError(
            f"{_owner(module)}: {ATTENTION_NAME} does not know the argument {name}, and whether it can be left out"
        )
    window, batch, kv_length = kwargs.get("sliding_window"), key.shape[0], key.shape[2]
    if window is not None and kv_length > window:
        raise NotImplementedError(
            f"{_owner(module)}: sliding_window={window} (config.sliding_window) with {kv_length} keys is not supported "
            f"by {ATTENTION_NAME} yet; windows with room for every key are"
        )
    if attention_mask is None:
        return
    channels = (1,) if query.shape[2] == 1 else (1, 2)
    if attention_mask.dtype != torch.bool or attention_mask.shape not in [(batch, c, 1, kv_length) for c in channels]:
        raise NotImplementedError(
            f"{_owner(module)}: attention_mask {describe(attention_mask)} given; {ATTENTION_NAME} accepts bool "
            f"({batch}, 1, 1, {kv_length}), which its mask function makes from an attention_mask (B, K)"
        )


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _owner(module: nn.Module) -> str:
    return f"{type(module).__name__} of {getattr(_config(module), 'model_type', 'an unknown model')}"


def _full_name(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"
