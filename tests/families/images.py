"""Text with images in it, for models that put the features of an image in the place of placeholder tokens."""

import inspect
import itertools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.inputs import ROWS, SHAPES, Arguments, Inputs, find
from tests.families.shrinking import PAD

BEFORE, BEHIND, PADDING = 3, 5, 2  # tokens around an image, and of padding on the left of the first row
MAX_FEATURES = 128  # of an image


def image_arguments(model: PreTrainedModel, inputs: Inputs) -> tuple[Arguments, Tensor] | None:
    """Arguments of a batch that is padded on the left, and its mask; None where no image can be made."""
    placeholder = find(model.config, "image_token_id", "image_token_index")
    if not hasattr(model, "get_image_features") or not isinstance(placeholder, int):
        return None
    names = inspect.signature(model.get_image_features).parameters.keys() & SHAPES.keys() & inputs.names
    names -= {"input_ids", "attention_mask", "position_ids"}
    if "pixel_values" not in names:
        return None
    for arguments in _images(inputs, sorted(names)):
        if (count := _features(model, arguments)) is None:
            continue
        text, mask = _text(inputs, placeholder, count)
        is_image = text["input_ids"] == placeholder
        if "decoder_input_ids" in inputs.names:
            text["decoder_input_ids"] = inputs.decoder_ids()
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs.names:
                text[name] = is_image.long()
        with torch.no_grad():
            try:
                model(**text, **arguments)
            except Exception:
                continue
        return {**text, **arguments}, mask
    return None


def _images(inputs: Inputs, names: list[str]):
    """All shapes of what an image is given as, with the fewest arguments last: what is optional often decides."""
    for chosen in (names, [name for name in names if name == "pixel_values"]):
        for shapes in itertools.product(*(SHAPES[name] for name in chosen)):
            inputs.random = torch.Generator().manual_seed(inputs.seed)
            try:
                yield {name: shape(inputs) for name, shape in zip(chosen, shapes, strict=True)}
            except Exception:
                continue


def _features(model: PreTrainedModel, arguments: Arguments) -> int | None:
    """How many placeholders each row has; None where the model cannot read the images."""
    with torch.no_grad():
        try:
            features = model.get_image_features(**arguments)
        except Exception:
            return None
    if (pooled := getattr(features, "pooler_output", None)) is not None:
        features = pooled
    features = getattr(features, "last_hidden_state", features)
    tensors = features if isinstance(features, list | tuple) else [features]
    if not all(isinstance(t, Tensor) for t in tensors):
        return None
    count, rest = divmod(sum(t.numel() // t.shape[-1] for t in tensors), ROWS)
    return count if rest == 0 and 0 < count <= MAX_FEATURES else None


def _text(inputs: Inputs, placeholder: int, count: int) -> tuple[Arguments, Tensor]:
    length = PADDING + BEFORE + count + BEHIND
    ids = inputs.ids(ROWS, length)
    mask = torch.ones_like(ids)
    for row, start in enumerate((PADDING + BEFORE, BEFORE)):
        ids[row, start : start + count] = placeholder
    ids[0, :PADDING], mask[0, :PADDING] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}, mask
