"""Inputs of a tiny model, from the names of its forward's parameters.

A family says what it reads in the signature of `forward` alone, and not in which shape. So each name has a list of
shapes that some family reads, and the first combination that runs with eager attention is taken.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.families.shrinking import BOS, FIRST_SPECIAL_TOKEN, PAD

ROWS = 2
LENGTH, ENCODER_LENGTH = 13, 11
FRAMES, CHUNKED_FRAMES = 64, 200  # of a spectrogram, and of one that is cut into chunks of 100
SAMPLES = 3840  # of a wave
VIDEO_FRAMES = 2
MAX_TRIALS = 40

# True where a row has a token. No row of "right" is full, as in a batch that was padded to a fixed length.
LENGTHS = {"none": (1.0, 1.0), "left": (0.5, 1.0), "right": (0.85, 0.45)}
# Positions of each row without one.
HIDDEN = {"holes": ([2, 3, -4], [0, 1, 5]), "mixed": ([0, 1, 5], [-1, -2, -3, -4])}

Arguments = dict[str, Any]


def mask_of(padding: str, length: int = LENGTH) -> Tensor:
    """(B, S) int64."""
    positions = torch.arange(length)
    if padding in HIDDEN:
        mask = torch.ones(ROWS, length, dtype=torch.long)
        for row, hidden in enumerate(HIDDEN[padding]):
            mask[row, hidden] = 0
        return mask
    lengths = torch.tensor([[max(2, round(share * length))] for share in LENGTHS[padding]])
    return (positions >= length - lengths if padding == "left" else positions < lengths).long()


def find(config: PreTrainedConfig, *names: str, default: Any = None, prefer: str = "") -> Any:
    """The first of the fields that a configuration or one of its parts has and sets, the preferred part first."""
    parts = [getattr(config, name, None) for name in getattr(type(config), "sub_configs", {})]
    keys = list(getattr(type(config), "sub_configs", {}))
    ordered = sorted(zip(keys, parts, strict=True), key=lambda pair: not (prefer and prefer in pair[0]))
    preferred = [part for key, part in ordered if part is not None and prefer and prefer in key]
    others = [part for key, part in ordered if part is not None and not (prefer and prefer in key)]
    for part in preferred:
        if (value := find(part, *names, prefer=prefer)) is not None:
            return value
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # fields that differ by layer refuse to be read
            value = None
        if value is not None:
            return value
    for part in others:
        if (value := find(part, *names, prefer=prefer)) is not None:
            return value
    return default


def pair(size: Any) -> tuple[int, int]:
    return (size[0], size[-1]) if isinstance(size, list | tuple) else (size, size)


class Inputs:
    """Makes arguments for one model; the same seed gives the same ones."""

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        self.config = model.config
        self.main = model.main_input_name if isinstance(model.main_input_name, str) else "pixel_values"
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        self.required = {p.name for p in parameters if p.default is p.empty and p.name in self.names}
        self.seed = seed
        self.vision = {"prefer": "vision"}
        self.audio = {"prefer": "audio"}

    def candidates(self) -> Iterator[Arguments]:
        """From the fewest arguments to the most, each in all of its shapes."""
        decoder = {"decoder_input_ids"} & self.names
        first = ({self.main} & self.names) | self.required | decoder
        core = {name for name in CORE if name in self.names}
        optional = {name for name in SHAPES if name in self.names} - ALTERNATIVES
        mask = {"attention_mask"} & self.names
        some = core & {"input_ids", "pixel_values", "bbox"}
        sets = [first, first | some, first | core, first | core | mask, first | optional]
        unique: list[set[str]] = []
        for names in sets:
            if names and names not in unique and names <= SHAPES.keys():
                unique.append(names)
        for names in unique:
            ordered = sorted(names)
            shapes = [SHAPES[name] for name in ordered]
            for combination in itertools.islice(itertools.product(*shapes), MAX_TRIALS):
                self.random = torch.Generator().manual_seed(self.seed)
                try:
                    yield {name: shape(self) for name, shape in zip(ordered, combination, strict=True)}
                except (AttributeError, TypeError, ZeroDivisionError, RuntimeError):
                    continue

    def missing(self) -> set[str]:
        return self.required - SHAPES.keys()

    # Tensors, from one generator.

    def length(self) -> int:
        """Of the text, which is an encoder's where there is a decoder, too."""
        return ENCODER_LENGTH if "decoder_input_ids" in self.names else LENGTH

    def ids(self, *shape: int) -> Tensor:
        vocabulary = find(self.config, "vocab_size", prefer="text", default=FIRST_SPECIAL_TOKEN)
        if not isinstance(vocabulary, int) or vocabulary < 8:
            vocabulary = FIRST_SPECIAL_TOKEN
        return torch.randint(3, min(vocabulary, FIRST_SPECIAL_TOKEN), shape, generator=self.random)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def decoder_ids(self) -> Tensor:
        ids = self.ids(ROWS, LENGTH)
        ids[:, 0] = find(self.config, "decoder_start_token_id", default=BOS)
        return ids

    def image(self, *between: int) -> Tensor:
        channels = find(self.config, "num_channels", "in_channels", "in_chans", default=3, **self.vision)
        channels = channels if isinstance(channels, int) else 3
        return self.noise(ROWS, *between, channels, *self.image_size())

    def image_size(self) -> tuple[int, int]:
        size = find(self.config, "image_size", "img_size", "input_size", default=64, **self.vision)
        return pair(size if isinstance(size, int | list | tuple) else 64)

    def patch_size(self) -> int:
        return pair(find(self.config, "patch_size", default=8, **self.vision))[0]

    def grid(self) -> Tensor:
        """(B, 3): frames, rows and columns of patches of each image."""
        return torch.tensor([[1, 4, 4]] * ROWS)

    def coordinates(self) -> Tensor:
        """(B, 16, 2): row and column of each patch."""
        return torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(ROWS, -1, -1)

    def patches(self, is_batched: bool = False, frames: int | None = None) -> Tensor:
        channels = find(self.config, "num_channels", "in_channels", default=3, **self.vision)
        frames = frames or pair(find(self.config, "temporal_patch_size", default=1, **self.vision))[0]
        size = channels * frames * self.patch_size() ** 2
        return self.noise(ROWS, 16, size) if is_batched else self.noise(ROWS * 16, size)

    def mels(self) -> int:
        names = ("num_mel_bins", "feature_size", "n_mels", "mel_bins", "input_feat_per_channel", "input_dim")
        bins = find(self.config, *names, default=16, **self.audio)
        return bins if isinstance(bins, int) else 16

    def frames(self) -> int:
        positions = find(self.config, "max_source_positions", **self.audio)
        return min(2 * positions, 256) if isinstance(positions, int) else FRAMES

    def series(self, *names: str) -> int:
        return find(self.config, *names, default=16)


Shape = Callable[[Inputs], Any]

IDS: list[Shape] = [
    lambda i: i.ids(ROWS, i.length()),
    lambda i: i.ids(ROWS, LENGTH, find(i.config, "num_codebooks", "num_channels")),
    lambda i: i.ids(ROWS, LENGTH, find(i.config, "num_codebooks") + 1),
    lambda i: i.ids(ROWS * find(i.config, "num_codebooks"), LENGTH),
    lambda i: i.ids(ROWS, find(i.config, "num_codebooks"), LENGTH),
]
DECODER_IDS: list[Shape] = [
    Inputs.decoder_ids,
    lambda i: i.ids(ROWS, LENGTH, find(i.config, "num_codebooks", "num_channels", prefer="decoder")),
    lambda i: i.ids(ROWS * find(i.config, "num_codebooks", prefer="decoder"), LENGTH),
]
IMAGES: list[Shape] = [
    Inputs.image,
    lambda i: i.image(pair(find(i.config, "num_frames", default=VIDEO_FRAMES))[0]),
    lambda i: i.image(1),
    lambda i: i.image(3),
    Inputs.patches,
    lambda i: i.patches(is_batched=True),
    lambda i: i.patches(frames=2),
    lambda i: i.noise(ROWS, 3, 48, 96),  # a line of text
    lambda i: i.image()[..., : i.image_size()[0] // 2, :],  # a prompt is put above it
    lambda i: i.patches().unflatten(-1, (-1, i.patch_size(), i.patch_size())),
]
FEATURES: list[Shape] = [
    lambda i: i.noise(ROWS, i.mels(), i.frames()),
    lambda i: i.noise(ROWS, i.frames(), i.mels()),
    lambda i: i.noise(ROWS, 1, i.mels(), i.frames()),
    lambda i: i.noise(ROWS, 1, i.frames(), i.mels()),
    lambda i: i.noise(ROWS, i.frames(), find(i.config, "feature_projection_input_dim", "hidden_size")),
    lambda i: i.noise(ROWS, i.frames(), 128),
    lambda i: i.noise(ROWS, i.frames(), 7 * i.mels()),  # seven frames are stacked
    lambda i: i.noise(ROWS, i.mels(), 8 * LENGTH),  # a token has eight frames
    lambda i: i.noise(ROWS, i.mels(), CHUNKED_FRAMES),
    lambda i: i.noise(ROWS, SAMPLES),
]
WAVES: list[Shape] = [
    lambda i: i.noise(ROWS, SAMPLES),
    lambda i: i.noise(ROWS, find(i.config, "audio_channels", default=1), SAMPLES),
    lambda i: i.noise(ROWS, 1, SAMPLES),
    lambda i: i.noise(ROWS, find(i.config, "max_length", default=FRAMES), i.mels()),
    lambda i: i.noise(ROWS, FRAMES, i.mels()),
    lambda i: i.ids(ROWS, ENCODER_LENGTH),
]
HIDDEN_STATES: list[Shape] = [
    lambda i: i.noise(ROWS, LENGTH, find(i.config, "hidden_size", "d_model", "embed_dim", "hidden_dim")),
    Inputs.patches,
    lambda i: i.noise(ROWS * 16, find(i.config, "hidden_size", "embed_dim")),
    lambda i: i.image(),
]
BOXES: list[Shape] = [
    lambda i: i.ids(ROWS, i.length(), 2).sort(-1).values.repeat(1, 1, 2),
    lambda i: torch.rand(ROWS, LENGTH, 8, generator=i.random),
]
SERIES: list[Shape] = [
    lambda i: i.noise(ROWS, i.series("context_length")),
    lambda i: i.noise(ROWS, i.series("context_length"), i.series("num_input_channels", "input_size")),
    lambda i: i.noise(ROWS, i.series("context_length") + max(i.series("lags_sequence"))),
]
STATES: list[Shape] = [lambda i: i.noise(ROWS, LENGTH, i.series("state_dim"))]

# Shapes by the name of the parameter.
SHAPES: dict[str, list[Shape]] = {
    "input_ids": IDS,
    "decoder_input_ids": DECODER_IDS,
    "pixel_values": IMAGES,
    "pixel_values_videos": [lambda i: i.image(pair(find(i.config, "num_frames", default=VIDEO_FRAMES))[0])],
    "pixel_values_images": [Inputs.image],
    "image_grid_thw": [Inputs.grid],
    "grid_thw": [Inputs.grid],
    "image_sizes": [lambda i: torch.tensor([i.image_size()] * ROWS)],
    "input_features": FEATURES,
    "input_values": WAVES,
    "hidden_states": HIDDEN_STATES,
    "inputs_embeds": HIDDEN_STATES[:1],
    "bbox": BOXES,
    "past_values": SERIES,
    "future_values": [lambda i: i.noise(ROWS, i.series("prediction_length"))],
    "past_observed_mask": [lambda i: torch.ones(ROWS, i.series("context_length"))],
    "past_time_features": [lambda i: i.noise(ROWS, i.series("context_length") + max(i.series("lags_sequence")), 1)],
    "future_time_features": [lambda i: i.noise(ROWS, i.series("prediction_length"), 1)],
    "states": STATES,
    "actions": [lambda i: i.noise(ROWS, LENGTH, i.series("act_dim"))],
    "rewards": [lambda i: i.noise(ROWS, LENGTH, 1)],
    "returns_to_go": [lambda i: i.noise(ROWS, LENGTH, 1)],
    "timesteps": [lambda i: torch.arange(LENGTH).expand(ROWS, -1)],
    "visual_feats": [lambda i: i.noise(ROWS, 5, i.series("visual_feat_dim"))],
    "visual_pos": [lambda i: i.noise(ROWS, 5, i.series("visual_pos_dim"))],
    "spectrogram": [lambda i: i.noise(ROWS, i.frames(), i.series("model_in_dim", "num_mel_bins"))],
    "flattened_patches": [
        lambda i: torch.cat([i.coordinates().float(), i.noise(ROWS, 16, i.series("patch_embed_hidden_size"))], dim=-1)
    ],
    "attention_mask": [lambda i: mask_of("none", i.length())],
    "pixel_attention_mask": [lambda i: torch.ones(ROWS, 16, dtype=torch.long)],
    "input_features_mask": [
        lambda i: torch.ones(ROWS, i.frames(), dtype=torch.long),
        lambda i: torch.ones(ROWS, CHUNKED_FRAMES, dtype=torch.long),
    ],
    "feature_attention_mask": [lambda i: torch.ones(ROWS, i.frames(), dtype=torch.long)],
    "is_longer": [lambda i: torch.zeros(ROWS, 1, dtype=torch.bool)],
    "qformer_input_ids": [lambda i: i.ids(ROWS, LENGTH)],
    "query_embeds": [lambda i: i.noise(ROWS, 4, i.series("hidden_size"))],
    "noise_embeds": [lambda i: i.noise(ROWS, 4, i.series("hidden_size"))],
    "context_hidden_states": [lambda i: i.noise(ROWS, LENGTH, i.series("hidden_size"))],
    "audio_mel": [lambda i: i.noise(ROWS, FRAMES, i.series("input_feat_size"))],
    "audio_mel_mask": [lambda i: torch.zeros(ROWS, FRAMES, dtype=torch.bool)],
    "task_inputs": [lambda i: i.ids(ROWS, i.series("task_seq_len"))],
    "prompt_pixel_values": IMAGES[-2:-1],
    "prompt_masks": IMAGES[-2:-1],
    "inputs": [IDS[0], WAVES[0]],
    "encoder_hidden_states": [lambda i: i.noise(ROWS, 7, i.series("encoder_hidden_size", "hidden_size"))],
    "image_attention_mask": [lambda i: torch.ones(ROWS, LENGTH, VIDEO_FRAMES, dtype=torch.long)],
    "image_embeds_position_mask": [
        lambda i: (torch.arange(LENGTH) < find(i.config, "latent_query_num")).expand(ROWS, -1)
    ],
    "past_values_padding": [lambda i: torch.zeros(ROWS, i.series("context_length"), dtype=torch.long)],
    "freq": [lambda i: torch.zeros(ROWS, 1, dtype=torch.long)],
    "latents": [
        lambda i: i.noise(ROWS, LENGTH, i.series("hidden_size")),
        lambda i: i.noise(ROWS, i.series("hidden_size"), LENGTH),
    ],
    "state": [lambda i: i.noise(ROWS, i.series("max_state_dim", "state_dim"))],
    "image_position_ids": [Inputs.coordinates],
    "pixel_position_ids": [Inputs.coordinates],
    "merge_sizes": [lambda i: torch.tensor([2] * ROWS)],
    "target_sizes": [lambda i: torch.tensor([[4, 4]] * ROWS)],
    "spatial_shapes": [lambda i: torch.tensor([[4, 4]] * ROWS)],
    "position_ids": [lambda i: torch.arange(LENGTH).expand(ROWS, -1)],
}
# Given where they are required, because most models take them in the place of other arguments.
ALTERNATIVES = {"inputs_embeds", "hidden_states", "attention_mask", "position_ids"}
CORE = ("input_ids", "pixel_values", "input_features", "input_values", "bbox", "pixel_values_videos", "image_grid_thw")


def with_padding(arguments: Arguments, padding: str, prefix: str = "") -> Arguments | None:
    """The same with a mask for the tokens, and padding's own token where it hides them; None without tokens."""
    ids = arguments.get(f"{prefix}input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[0] != ROWS:
        return None
    mask = mask_of(padding, ids.shape[1])
    return {**arguments, f"{prefix}input_ids": ids.where(mask.bool(), PAD), f"{prefix}attention_mask": mask}
