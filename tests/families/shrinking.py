"""Shrinks a family's default configuration until its model is tiny, by rules for the names of fields.

A rule never enlarges a number, so that sizes which a configuration keeps small stay as they are. `overrides.py` has
what no rule for names can know.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from transformers import PreTrainedConfig

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
    """Numbers become `limit`; of a number in a list, its share of the first one is kept."""

    def rule(value: Any) -> Any:
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            return type(value)(max(1, v * min(limit, value[0]) // max(value[0], 1)) for v in value)
        return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value

    return rule


def each_at_most(limit: int) -> Rule:
    def rule(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(rule, value))
        return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value

    return rule


def heads(value: Any) -> Any:
    """Of hierarchical models the numbers of heads grow with the width."""
    if isinstance(value, list | tuple):
        return type(value)(max(1, v // max(value[0], 1)) for v in value)
    return min(value, HEADS) if isinstance(value, int) else value


def key_heads(value: Any) -> Any:
    return min(value, HEADS // 2) if isinstance(value, int) else value


def zero(value: Any) -> Any:
    return type(value)(0) if isinstance(value, int | float) and not isinstance(value, bool) else value


def window(value: Any) -> Any:
    """Of vision models, in patches, or in pixels where it is large."""
    return value if not isinstance(value, int) else 2 if value <= 32 else 16


def patch(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(patch, value))
    return value if not isinstance(value, int) or value <= 8 else 8


DROPOUT = r"(.*_)?(dropout|drop|pdrop|layerdrop|jitter)(_.*)?|.*layerdrop.*|mask_(time|feature)_prob|mask_ratio|label_noise_ratio"

# The first pattern that matches the whole name decides.
RULES: tuple[tuple[str, Rule], ...] = (
    (DROPOUT, zero),
    (r".*vocab_size.*|.*vocabulary_size|.*_group_vocab", each_at_most(VOCABULARY)),
    (r"(num_)?(key_value|kv|kv_attention|.*key_value|.*_kv)_heads|n_head_kv|num_kv_heads|multi_query_group_num", key_heads),
    (r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|heads|nhead|num_.*_heads)", heads),
    (r"(qk_nope|qk_rope|v|qk|.*)_?head_dim|head_size|attention_head_size|d_kv|kv_channels|dim_head", each_at_most(HEAD_DIM)),
    (r".*lora_rank|.*lora_r|.*_rank", each_at_most(HEAD_DIM)),
    (r"(.*_)?num_experts|num_local_experts|n_routed_experts|moe_num_experts", each_at_most(4)),
    (r"num_experts_per_tok|moe_topk|moe_k|num_selected_experts|moe_top_k|top_k_experts", each_at_most(2)),
    (r"n_group|topk_group|num_expert_group", each_at_most(1)),
    (r"n_shared_experts|first_k_dense_replace|num_dense_layers", each_at_most(1)),
    (r"sliding_window(_size)?|attention_window_size|local_attention_window_len", each_at_most(WINDOW)),
    (r"local_attention", each_at_most(WINDOW + 1)),
    (r"use_sliding_window", lambda value: True),
    (r"window_size", window),
    (r"mm_tokens_per_image", each_at_most(4)),
    (r"image_grid_pinpoints", lambda value: [[32, 64]] if value else value),
    (r"attention_chunk_size|rotary_dim|rotary_emb_dim|num_filters", each_at_most(8)),
    (r"global_attn_indexes|global_attention_blocks", lambda value: type(value)([1]) if value else value),
    (r"depths|(.*_)?depth|num_blocks|.*num_blocks_per_.*|block_repeat|layers_per_block", each_at_most(LAYERS)),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|num_.*_layers|num_encoder_blocks)", each_at_most(LAYERS)),
    (r"max_window_layers|full_attention_interval|attn_layer_period|attention_interval", each_at_most(1)),
    (r"(.*_)?(max_position_embeddings|n_positions|max_(source|target|text)_positions|n_ctx|max_seq_len)", each_at_most(POSITIONS)),
    (r"context_length|max_sequence_length|original_max_position_embeddings", each_at_most(POSITIONS)),
    (r"(.*_)?image_size|img_size|input_size", each_at_most(32)),
    (r"(.*_)?patch_size", patch),
    (r"num_mel_bins|feature_size|n_mels|mel_bins|num_mel_filters", each_at_most(16)),
    (r"hidden_sizes|embed_dims?|neck_hidden_sizes|encoder_hidden_sizes|embedding_size|width|widths", at_most(32 * 2)),
    (r"conv_dim|tdnn_dim", each_at_most(32)),
    (r"(.*_)?(moe|shared|expert)_.*intermediate_size", each_at_most(32)),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|feedforward_dim|intermediate_dim)", each_at_most(HIDDEN)),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_dim|emb_dim|projection_dim|output_dim|dim)", each_at_most(HIDDEN)),
    (r"(.*_)?(hidden_channels|proj_size|projection_size|codebook_size|codevector_dim|embedding_size|proj_dim|output_channels)", each_at_most(HIDDEN)),
    (r"hidden_size_.*|.*_hidden_size_.*|upsample_initial_channel", each_at_most(HIDDEN)),
    (r"base_channels", each_at_most(32)),
    (r"num_queries|num_denoising|num_query_tokens|train_num_points|num_latents|num_object_queries", each_at_most(6)),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_chunk_size|chunk_size", each_at_most(16)),
)  # fmt: skip
COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in RULES)

# What is cut to the layers that are left: one layer of each type, in the order of the first layers that have it.
BY_LAYER = ("layer_types", "layers_block_type", "block_types", "attention_types", "indexer_types")
TOKEN = re.compile(r"(?:(.*)_)?token_(id|index)|(.*)_token_(?:id|index)_?.*")


class Shrinker:
    """Shrinks one family's configuration; special tokens of one name get one id in it and all parts of it."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.tokens: dict[str, int] = {}

    def shrunk(self, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
        changes = CHANGES.get(config_class.model_type, {})
        given = {name: value() if callable(value) else value for name, value in changes.items()}
        if not given.pop("shrink", True):
            return config_class(**given)
        parts = {name: value for name, value in given.items() if name in config_class.sub_configs}
        try:
            default = config_class(**{n: v for n, v in parts.items() if isinstance(v, PreTrainedConfig)})
        except Exception:  # not every configuration has a default
            default = config_class(**parts)
        for name, part in config_class.sub_configs.items():
            if name == "vision_config" and getattr(default, name) is None:
                given.setdefault(name, part())
        return self._of(default, given)

    def _of(self, config: PreTrainedConfig, given: dict[str, Any]) -> PreTrainedConfig:
        arguments: dict[str, Any] = {}
        parts = getattr(type(config), "sub_configs", {})
        untouched = _default_of(config)
        for field in fields(config):
            value = read(config, field.name)
            if isinstance(given.get(field.name), PreTrainedConfig) and value is None:
                value = given.pop(field.name)  # a part that is left out by default
            if isinstance(value, PreTrainedConfig) and isinstance(given.get(field.name, {}), dict):
                arguments[field.name] = self._of(value, self._changes(value) | given.get(field.name, {}))
            elif field.name in given:
                arguments[field.name] = given[field.name]
            elif field.name in parts:
                continue
            elif field.name in (*BY_LAYER, "_out_features", "_out_indices") or _is_derived(field, value, config):
                continue
            elif field.name == "head_dim" and value is None:
                arguments[field.name] = HEAD_DIM  # some models read it as it is
            elif (changed := self._changed(field.name, value)) != value or value != read(untouched, field.name):
                arguments[field.name] = changed
        arguments |= _consistent(config, arguments) | _features(config, untouched)
        arguments |= {name: value for name, value in given.items() if name not in arguments}
        arguments |= _layers(config, arguments)
        return type(config)(**_plain(arguments))

    def _changes(self, config: PreTrainedConfig) -> dict[str, Any]:
        changes = CHANGES.get(type(config).model_type, {})
        return {n: v() if callable(v) else v for n, v in changes.items() if n != "shrink"}

    def _changed(self, name: str, value: Any) -> Any:
        if TOKEN.fullmatch(name) and isinstance(value, int | list):
            return self._token(name)
        for pattern, rule in COMPILED:
            if pattern.fullmatch(name):
                return rule(value)
        return value

    def _token(self, name: str) -> int | None:
        kind = name.removesuffix("_id").removesuffix("_index").removesuffix("_token")
        if kind in SPECIAL_TOKENS:
            return SPECIAL_TOKENS[kind]
        return self.tokens.setdefault(kind, FIRST_SPECIAL_TOKEN + len(self.tokens))


def without_dropout(config: PreTrainedConfig) -> None:
    """Sets all probabilities of leaving something out to 0, in the parts too."""
    for field in fields(config):
        value = read(config, field.name)
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif re.fullmatch(DROPOUT, field.name) and isinstance(value, float):
            setattr(config, field.name, 0.0)


def _is_derived(field: Any, value: Any, config: PreTrainedConfig) -> bool:
    """Whether a list has an entry for each layer, which the configuration finds by itself."""
    layers = read(config, "num_hidden_layers")
    return _default(field) is None and isinstance(value, list | tuple) and len(value) == layers


def _default_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """What the class makes without arguments: what is equal there follows from other fields, or is the default."""
    try:
        return type(config)()
    except Exception:
        return config


def read(config: PreTrainedConfig, name: str) -> Any:
    """A field, or None where it differs by layer and refuses to be read."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _consistent(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """What depends on two fields."""
    changes: dict[str, Any] = {}
    of_queries, of_keys = read(config, "num_attention_heads"), read(config, "num_key_value_heads")
    has_one_for_each = of_keys is not None and of_keys == of_queries
    if "num_key_value_heads" in arguments and (has_one_for_each or arguments.get("kv_lora_rank")):
        changes["num_key_value_heads"] = arguments.get("num_attention_heads", of_queries)
    if isinstance(arguments.get("image_size"), int) and isinstance(patch := read(config, "patch_size"), int) and patch <= 4:
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


def _layers(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut so that every type of layer is left, and the number of layers."""
    changes: dict[str, Any] = {}
    for name in BY_LAYER:
        types = getattr(config, name, None)
        if not isinstance(types, list | tuple) or not types or name in arguments:
            continue
        if name not in {field.name for field in fields(config)}:
            continue
        kinds = list(dict.fromkeys(types))
        changes[name] = kinds if len(kinds) >= LAYERS else kinds * LAYERS
        changes["num_hidden_layers"] = len(changes[name])
    return changes


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Configurations of other libraries' models refuse fields that they set themselves."""
    return {n: v for n, v in arguments.items() if n not in ("transformers_version", "architectures")}
