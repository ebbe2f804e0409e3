"""Attention for Hugging Face Transformers: `attn_implementation="modelopt_triton"`.

Transformers calls two functions. The mask function (huggingface_mask.py) turns what a model wants of its mask into a
key mask and the number of a pattern, once per forward or, under `generate` with a static cache, before it. The
attention function gets that mask in every layer and calls the op, on the padded layout, so that the keys and values of
a cache are read where they lie, or on the packed layout (huggingface_sequences.py).

Shapes are B rows, Q query positions, K key positions, Hq query heads, Hkv key and value heads, head dimensions D, Dv.
"""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa_ops.attention import attention
from fa_ops.integrations.context_parallel import refuse_context_parallel
from fa_ops.integrations.huggingface_guard import guard_models
from fa_ops.integrations.huggingface_mask import triton_attention_mask
from fa_ops.integrations.huggingface_pattern import (
    ATTENTION_NAME,
    CENTRED,
    NO_WINDOW,
    KeyStates,
    MaskPattern,
    describe,
    has_waiting,
    pattern_of,
    read_mask,
    take_back,
)
from fa_ops.integrations.huggingface_sequences import Ranges, packed_ranges, padded_ranges
from fa_ops_meta.checks import MAX_HEAD_DIM, MIN_HEAD_DIM

# The attribute of an attention module that `fa_ops.sparsity` gives it, a `SparseAttentionMethod`.
SPARSE_ATTENTION = "sparse_attention"

# Arguments that change what attention means, and where the model has them from.
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a bias that is added to the scores",
    "indices": "sparse attention with an indexer, config.index_topk",
    "block_indices": "sparse attention with an indexer, config.index_topk_blocks",
    "seq_idx": "packed sequences without cu_seq_lens_q and cu_seq_lens_k, and without position_ids",
    "cache": "the paged cache of continuous batching",
    "output_attentions": 'config.output_attentions; attn_implementation="eager" returns attention weights',
}

# Arguments that are read where they are needed.
SUPPORTED_ARGUMENTS = frozenset(
    {"cu_seq_lens_k", "cu_seq_lens_q", "position_ids", "s_aux", "sinks", "sliding_window", "softcap"}
)

# What else travels with a model's keyword arguments, by kind. None of it has an effect on attention.
ARGUMENTS_WITHOUT_EFFECT = frozenset(
    {
        # of the loss
        "label_smoothing", "labels", "num_items_in_batch", "return_loss", "shift_labels",
        # of what the model returns, and in which form
        "logits_to_keep", "output_hidden_states", "output_router_logits", "return_dict", "return_shared_kv_states",
        # of the cache: it has been brought up to date before attention is called
        "cache_position", "past_key_values", "use_cache",
        # of other implementations of attention: bounds and switches that never change a result
        "deterministic", "max_length_k", "max_length_q",
        # of generation
        "cache_implementation", "disable_compile", "do_sample", "max_length", "max_new_tokens", "min_length",
        "min_new_tokens", "num_beams", "output_logits", "output_scores", "return_dict_in_generate",
        # of tokens: masks that depend on them come from the mask function
        "input_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids",
        # of images, videos and sounds: they have become embeddings before attention is called
        "grid_thw", "image_grid_thw", "image_sizes", "interpolate_pos_encoding", "video_grid_thw",
        "vision_feature_layer", "vision_feature_select_strategy",
    }
)  # fmt: skip

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
    guard_models()
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
    """Attention as Transformers' models call it, through `fa_ops.attention`; the host never waits, and what has a
    contiguous last dimension is not copied.

    query (B, Hq, Q, D), key (B, Hkv, K, D), value (B, Hkv, K, Dv), attention_mask None or what `triton_attention_mask`
    returns, scaling 1/√D by default. A mask says whether attention is causal. Without one it is what `is_causal` says,
    else the module's own `is_causal`.

    Sequences that are packed into rows are kept apart: those of `cu_seq_lens_q` and `cu_seq_lens_k`; those that
    Transformers finds, which it tells by the mask; and, where attention is causal and no mask hides a key, those whose
    `position_ids` restart.

    Returns the output (B, Q, Hq, Dv) and None for the attention weights. The output is 0 for queries that see no key,
    such as left padding, and with `module.training` for right padding too, which then costs nothing: leave padding out
    of the loss, with labels of -100.

    Raises NotImplementedError or ValueError, naming module, argument and configuration field, for what is not
    supported, and TypeError for arguments that it does not know.
    """
    refuse_context_parallel(_owner(module))
    _check_arguments(module, dropout, kwargs)
    _check_head_dims(module, query, value)
    pattern, states = _read_mask(module, attention_mask, query, key)
    is_causal = _is_causal(module, is_causal, query) if pattern is None else pattern.is_causal
    window_size = _window_size(module, pattern, is_causal, kwargs.get("sliding_window"), key)
    sinks = kwargs.get("s_aux")
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "softmax_scale": scaling,
        "window_size": window_size,
        "softcap": kwargs.get("softcap") or 0.0,
        "sinks": kwargs.get("sinks") if sinks is None else sinks,
    }
    query, key, value = (_as_rows(t) for t in (query, key, value))
    is_packed = pattern is not None and pattern.is_packed
    ranges = packed_ranges(query, key, states, is_packed, is_causal, module.training, **_packing(module, kwargs))
    is_decoding = query.shape[1] == 1
    if ranges is None:
        ranges = padded_ranges(query, key, states, is_causal, window_size, module.training)
        return _attend(module, query, key, value, ranges, options, is_decoding), None
    rows = query.shape[:2]
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    return _attend(module, query, key, value, ranges, options, is_decoding).unflatten(0, rows), None


def _as_rows(t: Tensor) -> Tensor:
    """(B, H, S, D) to (B, S, H, D), copied only where a model gives heads that do not lie in a row."""
    return t.transpose(1, 2) if t.stride(-1) == 1 else t.transpose(1, 2).contiguous()


def _check_head_dims(module: nn.Module, query: Tensor, value: Tensor) -> None:
    for name, head_dim in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{_owner(module)}: {name}: head dimension {head_dim} is not supported by {ATTENTION_NAME}; accepted "
                f"are {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
            )


def _read_mask(
    module: nn.Module, attention_mask: Tensor | None, query: Tensor, key: Tensor
) -> tuple[MaskPattern | None, KeyStates]:
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    is_eager = not torch.compiler.is_compiling()
    if is_eager and has_waiting() and not take_back(_config(module), attention_mask, batch, q_length, kv_length):
        raise NotImplementedError(
            f"{_owner(module)}: attention_mask: None given, while the mask that was made for {batch} rows of "
            f"{q_length} queries and {kv_length} keys hides some of them; {ATTENTION_NAME} accepts models that hand "
            "their masks on"
        )
    if attention_mask is None:
        return None, KeyStates(None)
    pattern = pattern_of(attention_mask, batch, kv_length)
    if pattern is None:
        raise NotImplementedError(
            f"{_owner(module)}: attention_mask {describe(attention_mask)} given for {batch} rows of {q_length} queries "
            f"and {kv_length} keys; {ATTENTION_NAME} accepts masks of its own mask function alone, as that makes them "
            "from an attention_mask (B, K); a mask of four dimensions that you made, or that the model changed, is "
            "not supported"
        )
    return pattern, read_mask(attention_mask, pattern, q_length, kv_length)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: Ranges,
    options: dict[str, Any],
    is_decoding: bool,
) -> Tensor:
    """The op, or the module's own sparse attention, which is told how many keys each sequence has at this call."""
    arguments = {**ranges._asdict(), **options}
    sparse_attention = getattr(module, SPARSE_ATTENTION, None)
    if sparse_attention is None or not sparse_attention.is_enabled:
        return cast(Tensor, attention(query, key, value, **arguments))
    visible_keys = ranges.b_seq_len if ranges.b_seq_len_k is None else ranges.b_seq_len_k
    if ranges.key_mask is not None:
        visible_keys = ranges.key_mask.sum(-1, dtype=torch.int32)
    return sparse_attention(query, key, value, visible_keys, is_decoding, arguments)


def _is_causal(module: nn.Module, given: bool | None, query: Tensor) -> bool:
    """Without a mask."""
    is_causal = getattr(module, "is_causal", None) if given is None else given
    if is_causal is None and query.shape[2] != 1:
        raise ValueError(
            f"{_owner(module)}: no attention_mask, is_causal was not given and the module has none; {ATTENTION_NAME} "
            "accepts True or False and never guesses it from the lengths"
        )
    return bool(is_causal)


def _window_size(
    module: nn.Module, pattern: MaskPattern | None, is_causal: bool, given: int | None, key: Tensor
) -> tuple[int, int]:
    """The window that the mask function found, of the configuration's size; the call may not say otherwise."""
    if pattern is None or pattern.window == NO_WINDOW:
        if given is not None and not statically_known_true(key.shape[2] <= given):
            raise ValueError(
                f"{_owner(module)}: sliding_window={given} given for {key.shape[2]} keys, with an attention_mask that "
                f"has no window; {ATTENTION_NAME} takes windows from its mask function"
            )
        return -1, -1
    sliding_window = _sliding_window(module)
    accepted = [sliding_window]
    if not is_causal and pattern.window != CENTRED:
        accepted.append(sliding_window + 1)  # of ModernBERT, which counts the query itself
    if given is not None and given not in accepted:
        raise ValueError(
            f"{_owner(module)}: sliding_window={given} given, config.sliding_window is {sliding_window}; "
            f"{ATTENTION_NAME} accepts {accepted} with this mask"
        )
    return pattern.window_size(sliding_window)


def _sliding_window(module: nn.Module) -> int:
    config = _config(module)
    try:
        return config.sliding_window
    except RuntimeError:  # Transformers' answer where layers have windows of several sizes
        return config.per_layer_config[module.layer_idx].sliding_window


def _packing(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
    given = {name: kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "position_ids")}
    if (given["cu_seq_lens_q"] is None) != (given["cu_seq_lens_k"] is None):
        raise ValueError(f"{_owner(module)}: cu_seq_lens_q and cu_seq_lens_k: one of them given; expected both or none")
    return given


def _check_arguments(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0 and module.training:
        field = next((name for name in DROPOUT_FIELDS if getattr(_config(module), name, None) == dropout), None)
        raise NotImplementedError(
            f"{_owner(module)}: dropout={dropout} in training is not supported; set "
            f"config.{field or DROPOUT_FIELDS[0]} to 0"
        )
    for name, given in kwargs.items():
        if name in SUPPORTED_ARGUMENTS or name in ARGUMENTS_WITHOUT_EFFECT or given is None or given is False:
            continue
        if name == "seq_idx" and any(kwargs.get(other) is not None for other in ("cu_seq_lens_q", "position_ids")):
            continue  # it says once more what these say
        if name in UNSUPPORTED_ARGUMENTS:
            raise NotImplementedError(
                f"{_owner(module)}: {name} ({UNSUPPORTED_ARGUMENTS[name]}) is not supported by {ATTENTION_NAME}"
            )
        raise TypeError(
            f"{_owner(module)}: {ATTENTION_NAME} does not know the argument {name}, and whether it can be left out"
        )


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _owner(module: nn.Module) -> str:
    return f"{type(module).__name__} of {getattr(_config(module), 'model_type', 'an unknown model')}"


def _full_name(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"
