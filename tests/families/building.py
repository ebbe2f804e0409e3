"""Transformers' families, and a tiny model of each: the most telling class over a shrunk default configuration."""

import copy
import importlib
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from fa_ops.integrations.huggingface import ATTENTION_NAME
from tests.families.overrides import CLASSES
from tests.families.shrinking import BOS, EOS, PAD, Shrinker

MAX_PARAMETERS = 20_000_000

# The classes that say most about attention come first: those that generate and those with logits for each token.
MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_CAUSAL_LM", "MODEL",
    "MODEL_FOR_TEXT_TO_WAVEFORM", "MODEL_FOR_RETRIEVAL",
)  # fmt: skip


class NotBuiltError(Exception):
    """Says why no tiny model of a family could be made here."""


@cache
def classes() -> dict[str, list[str]]:
    """The names of model classes by model type; model types that no auto class loads are parts of others."""
    found: dict[str, list[str]] = {}
    first = [f"{name}_MAPPING_NAMES" for name in MAPPINGS]
    others = sorted(n for n in vars(modeling_auto) if n.startswith("MODEL_FOR") and n.endswith("_MAPPING_NAMES"))
    for mapping in (*first, *others):
        for family, name in getattr(modeling_auto, mapping, {}).items():
            found.setdefault(family, []).append(name if isinstance(name, str) else name[0])
    return {family: found[family] for family in sorted(found.keys() & configuration_auto.CONFIG_MAPPING_NAMES.keys())}


def families() -> list[str]:
    return list(classes())


def folder_of(family: str) -> str:
    """The directory of `transformers/models` that has a family's code."""
    return configuration_auto.model_type_to_module_name(family)


def calls_interface(folder: str) -> bool:
    """Whether the code in a folder names Transformers' attention interface."""
    files = (Path(transformers.__file__).parent / "models" / folder).glob("modeling_*.py")
    return any("ALL_ATTENTION_FUNCTIONS" in file.read_text() for file in files)


def versions() -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    return f"Transformers {transformers.__version__}, PyTorch {torch.__version__}, Python {python}"


def model_class(family: str) -> type[PreTrainedModel]:
    module = folder_of(family)
    for name in filter(None, (CLASSES.get(family), *classes()[family])):
        for place in (f"models.{module}", "", f"models.{module}.modeling_{module}"):
            if found := getattr(importlib.import_module(f"transformers.{place}".rstrip(".")), name, None):
                return found
    raise NotBuiltError(f"{classes()[family][0]} is not in transformers.models.{module}")


def tiny_config(family: str) -> PreTrainedConfig:
    config_class = configuration_auto.CONFIG_MAPPING[family]
    return Shrinker().shrunk(config_class)


def parameters_of(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int | None:
    """How many a model would have; None where it cannot be made without memory for them."""
    try:
        with torch.device("meta"):
            model = cls(config)
    except Exception:
        return None
    return sum(p.numel() for p in model.parameters())


def tiny_model(family: str, seed: int = 0, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """With eager attention, float32 weights that make its outputs depend on attention, and no dropout."""
    try:
        cls = model_class(family)
        config = tiny_config(family) if config is None else copy.deepcopy(config)
        count = parameters_of(cls, copy.deepcopy(config))
        if count is not None and count > MAX_PARAMETERS:
            raise NotBuiltError(f"{cls.__name__} has {count:,} parameters in the smallest configuration found")
        torch.manual_seed(seed)
        model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(first_line(error)) from error
    if (count := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
        raise NotBuiltError(f"{cls.__name__} has {count:,} parameters in the smallest configuration found")
    draw_weights(model, seed)
    without_dropout(model)
    if model.can_generate():
        model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model.eval()


def draw_weights(model: nn.Module, seed: int) -> None:
    """Weights as of a trained model in size: scores that differ, gates that are open, norms and biases of their own.

    Initial weights would hide faults: with scores near 0 attention is a mean, and behind a gate of 0 it is nothing.
    """
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.is_floating_point() or not weight.numel():
                continue
            noise = torch.randn(weight.shape, generator=random)
            with torch.no_grad():
                if isinstance(module, nn.Embedding):
                    weight.copy_(0.5 * noise)
                elif weight.ndim >= 2:
                    fan_in = weight[0].numel() if isinstance(module, nn.modules.conv._ConvNd) else weight.shape[-1]
                    weight.copy_(1.4 * fan_in**-0.5 * noise)
                elif name == "sinks" or not weight.isfinite().all() or weight.abs().max() > 1e3:
                    weight.copy_(noise)
                elif (weight == weight.flatten()[0]).all():
                    first = float(weight.flatten()[0])
                    is_closed = (weight.numel() == 1 and first == 0) or 0 < abs(first) < 0.05
                    weight.copy_((0.5 if is_closed else first) + 0.1 * noise)


def loaded_as_ours(eager: PreTrainedModel) -> PreTrainedModel:
    """As a user has it: saved, and loaded with the name of our implementation; then with eager's very weights."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            eager.save_pretrained(folder)
            type(eager).from_pretrained(folder, attn_implementation="eager")
        except Exception:  # nothing to do with attention: what cannot be loaded is constructed
            config = copy.deepcopy(eager.config)
            ours = type(eager)._from_config(config, attn_implementation=ATTENTION_NAME, dtype=torch.float32)
        else:
            ours = type(eager).from_pretrained(folder, attn_implementation=ATTENTION_NAME)
    _make_equal(ours, eager)
    if eager.can_generate():
        ours.generation_config = copy.deepcopy(eager.generation_config)
    return ours.eval()


def _make_equal(ours: nn.Module, eager: nn.Module) -> None:
    """Weights, buffers and what a module's constructor sets; loading loses some of them."""
    of_eager = {**dict(eager.named_parameters()), **dict(eager.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*ours.named_parameters(), *ours.named_buffers()):
            if name in of_eager and tensor.shape == of_eager[name].shape:
                tensor.copy_(of_eager[name])
    for name, weight in ours.named_parameters():
        weight.requires_grad_(of_eager[name].requires_grad)
    without_dropout(ours)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def first_line(error: BaseException) -> str:
    """A message short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2])
    return f"{type(error).__name__}: {text}"[:300]
