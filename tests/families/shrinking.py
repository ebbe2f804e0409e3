"""Shrinks a family's default configuration until its model is tiny, by rules for the names of fields.

A rule never enlarges a number, so that sizes which a configuration keeps small stay as they are. `overrides.py` has
what no rule for names can know.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tests.families.overrides import CHANGES

VOCABULARY = 128
HIDDEN, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 2
POSITIONS = 64
WINDOW = 6  # shorter than the inputs, so that windows hide keys
PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": BOS, "forced_bos": None, "forced_eos": None}
FIRST_SPECIAL_TOKEN = 100  # ids from here on are placeholders, which random text does not contain

Rule = Callable[[Any], Any]


def at_most(limit: int) -> Rule:
    """Numbers, and each number of a list, become `limit` or stay below it."""

    def rule(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(rule, value))
        return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value

    return rule


def in_proportion(limit: int) -> Rule:
    """Of widths that grow from stage to stage, the first becomes `limit` or stays below it."""

    def rule(value: Any) -> Any:
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            return type(value)(max(1, v * min(limit, value[0]) // max(value[0], 1)) for v in value)
        return at_most(limit)(value)

    return rule


def heads(value: Any) -> Any:
    """Of stages that grow, the first has one head."""
    if isinstance(value, list | tuple):
        return type(value)(max(1, v // max(value[0], 1)) for v in value)
    return at_most(HEADS)(value)


def zero(value: Any) -> Any:
    return type(value)(0) if isinstance(value, int | float) and not isinstance(value, bool) else value


def window_of_patches(value: Any) -> Any:
    """Of vision models, in patches, or in pixels where it is large."""
    return value if not isinstance(value, int) else 2 if value <= 32 else 2 * 8


# The first pattern that matches a whole name decides. All but the first three may have any prefix that ends with "_".
DROPOUT = re.compile(
    r"(.*_)?(dropout|drop|pdrop|jitter)(_.*)?|.*layerdrop|mask_(time|feature)_prob|mask_ratio|label_noise_ratio"
)
RULES: tuple[tuple[str, Rule], ...] = (
    (DROPOUT.pattern, zero),
    (r".*vocab(ulary)?_size.*|.*_group_vocab", at_most(VOCABULARY)),
    (r"(hidden|embed|neck_hidden|encoder_hidden)_(sizes|dims?)|widths?", in_proportion(HIDDEN)),
    (r"(key_value|kv)_heads|n_head_kv", at_most(HEADS // 2)),
    (r"heads|n_heads?|nhead", heads),
    (r"head_dim|head_size|d_kv|dim_head", at_most(HEAD_DIM)),
    (r"lora_rank|rank", at_most(HEAD_DIM)),
    (r"num_experts|num_local_experts|n_routed_experts", at_most(4)),
    (r"num_experts_per_tok|moe_topk|moe_k|moe_top_k|top_k_experts", at_most(2)),
    (r"n_group|topk_group|n_shared_experts|first_k_dense_replace|num_dense_layers|max_window_layers", at_most(1)),
    (r"attn_layer_period", at_most(2)),
    (r"index_topk(_blocks)?", at_most(4)),
    (r"use_sliding_window", lambda value: True),
    (r"sliding_window(_size)?|attention_window_size|local_attention_window_len", at_most(WINDOW)),
    (r"local_attention", at_most(WINDOW + 1)),
    (r"window_size", window_of_patches),
    (r"attention_chunk_size|rotary_dim|num_filters", at_most(8)),
    (r"global_attn_indexes|global_attention_blocks", lambda value: type(value)([1]) if value else value),
    (r"depths?|num_blocks|layers|n_layers?|num_encoder_blocks", at_most(LAYERS)),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len", at_most(POSITIONS)),
    (r"context_length|max_sequence_length", at_most(POSITIONS)),
    (r"image_size|img_size|input_size", at_most(32)),
    (r"image_grid_pinpoints", lambda value: [[32, 64]] if value else value),
    (r"mm_tokens_per_image", at_most(4)),
    (r"patch_size", at_most(8)),
    (r"num_mel_bins|feature_size|n_mels|mel_bins", at_most(16)),
    (r"conv_dim|tdnn_dim|base_channels", at_most(32)),
    (r"(moe|shared|expert)_.*intermediate_size", at_most(32)),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|intermediate_dim", at_most(HIDDEN)),
    (r"hidden_size|hidden_dim|d_model|n_embd|embedding_(dim|size)|emb_dim|dim|hidden_size_.*", at_most(HIDDEN)),
    (r"hidden_channels|proj(ection)?_size|codebook_size|output_channels|upsample_initial_channel", at_most(HIDDEN)),
    (r"num_queries|num_denoising|num_query_tokens|train_num_points|num_latents", at_most(6)),
    (r"d_state|state_size|chunk_size", at_most(16)),
)
COMPILED = tuple(
    (re.compile(pattern if i < 3 else rf"(.*_)?({pattern})"), rule) for i, (pattern, rule) in enumerate(RULES)
)
TOKEN = re.compile(r"(.*)_token_(id|index)")

# Lists of which one entry for each kind is kept. Each is an entry for each layer.
BY_LAYER = ("layer_types", "layers_block_type")
# A constructor takes these without the underscore.
OF_BACKBONES = ("_out_features", "_out_indices")


class Shrinker:
    """Shrinks one family's configuration; special tokens of one name get one id in all of its parts."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def shrunk(self, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
        given = changes_of(config_class)
        parts = {name: value for name, value in given.items() if name in config_class.sub_configs}
        try:
            default = config_class(**{n: v for n, v in parts.items() if isinstance(v, PreTrainedConfig)})
        except Exception:  # not every configuration has a default
            default = config_class(**parts)
        part = config_class.sub_configs.get("vision_config")
        if part not in (None, AutoConfig) and default.vision_config is None:  # left out by default
            default.vision_config = part()
        return self._of(default, given)

    def _of(self, config: PreTrainedConfig, given: dict[str, Any]) -> PreTrainedConfig:
        arguments, untouched = dict(given), _default_of(config)
        for field in fields(config):
            name, value = field.name, read(config, field.name)
            if isinstance(value, PreTrainedConfig) and isinstance(given.get(name, {}), dict):
                arguments[name] = self._of(value, changes_of(type(value)) | given.get(name, {}))
            elif name in given or name in type(config).sub_configs or _is_derived(field, value, config):
                continue
            elif name == "head_dim" and value is None:
                arguments[name] = HEAD_DIM  # some models read it as it is
            elif (changed := self._changed(name, value)) != value or value != read(untouched, name):
                arguments[name] = changed
        arguments |= _consistent(config, arguments) | _features(config, untouched)
        arguments |= _kinds_of_layers(config, arguments)
        return type(config)(**arguments)

    def _changed(self, name: str, value: Any) -> Any:
        if (token := TOKEN.fullmatch(name)) and isinstance(value, int | list):
            kind = token[1]
            if kind in SPECIAL_TOKENS:
                return SPECIAL_TOKENS[kind]
            return self.tokens.setdefault(kind, FIRST_SPECIAL_TOKEN + len(self.tokens))
        return next((rule(value) for pattern, rule in COMPILED if pattern.fullmatch(name)), value)


def changes_of(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    changes = CHANGES.get(config_class.model_type, {})
    return {name: value() if callable(value) else value for name, value in changes.items()}


def without_dropout(config: PreTrainedConfig) -> None:
    """Sets all probabilities of leaving something out to 0, in the parts too."""
    for field in fields(config):
        value = read(config, field.name)
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif DROPOUT.fullmatch(field.name):
            setattr(config, field.name, zero(value))


def read(config: PreTrainedConfig, name: str) -> Any:
    """A field, or None where it differs by layer and refuses to be read."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


def _default_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """What the class makes without arguments: what is equal there follows from other fields, or is the default."""
    try:
        return type(config)()
    except Exception:
        return config


def _is_derived(field: Field, value: Any, config: PreTrainedConfig) -> bool:
    """Whether a constructor finds it by itself: lists with an entry for each layer, and what backbones give."""
    if field.name in (*BY_LAYER, *OF_BACKBONES):
        return True
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    is_by_layer = isinstance(value, list | tuple) and len(value) == read(config, "num_hidden_layers")
    return default is None and is_by_layer


def _consistent(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """What depends on two fields."""
    changes: dict[str, Any] = {}
    of_queries, of_keys = read(config, "num_attention_heads"), read(config, "num_key_value_heads")
    has_one_for_each = of_keys is not None and of_keys == of_queries
    if "num_key_value_heads" in arguments and (has_one_for_each or arguments.get("kv_lora_rank")):
        changes["num_key_value_heads"] = arguments.get("num_attention_heads", of_queries)
    patch = read(config, "patch_size")
    if isinstance(arguments.get("image_size"), int) and isinstance(patch, int) and patch <= 4:
        changes["image_size"] = 64  # each stage halves it
    return changes


def _features(config: PreTrainedConfig, untouched: PreTrainedConfig) -> dict[str, Any]:
    """Of a backbone the layers or stages that it gives, as many as before."""
    given = read(config, "out_features")
    if not given or given == read(untouched, "out_features"):
        return {}
    if isinstance(read(config, "depths"), list | tuple) or not isinstance(read(config, "num_hidden_layers"), int):
        return {"out_features": list(given)}
    layers = max(LAYERS, len(given))
    return {"num_hidden_layers": layers, "out_indices": list(range(layers - len(given) + 1, layers + 1))}


def _kinds_of_layers(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, in the order of the first layers that are of it."""
    names = {field.name for field in fields(config)}
    for name in BY_LAYER:
        types = read(config, name)
        if name in names and name not in arguments and isinstance(types, list | tuple) and types:
            kinds = list(dict.fromkeys(types))
            kinds = kinds if len(kinds) >= LAYERS else kinds * LAYERS
            return {name: kinds, "num_hidden_layers": len(kinds)}
    return {}
