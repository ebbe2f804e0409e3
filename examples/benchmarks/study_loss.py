"""Windows of text, the loss of a model on them at a λ, and what a difference of two losses is worth."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from study_attention import SCORES_AT_ONCE, Margins, Setting, Skip
from textdata import BOUNDARY, Document
from torch import Tensor
from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 26
REPLICATES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
BEYOND = 0.02  # share by which a curve may be extended


class Windows(NamedTuple):
    """Texts of one length: token ids (W, S), and the bytes (W,) that the tokens after the first one spell."""

    ids: Tensor
    bytes: np.ndarray


class Losses(NamedTuple):
    """Of each window, (W,) float64: nats, blocks visited, blocks dropped."""

    nats: np.ndarray
    visited: np.ndarray
    dropped: np.ndarray

    @property
    def share(self) -> float:
        return float(self.dropped.sum() / self.visited.sum())


def cut_windows(documents: Sequence[Document], context: int, count: int, tokenizer: Any) -> Windows:
    """Windows from line starts, spread evenly over the documents joined. Without a tokenizer token i is byte i, behind
    the boundary that begins the texts that such a model learns."""
    text = b"\n".join(text for _, text in documents)
    size = context - 1 if tokenizer is None else 8 * context  # bytes, which hold at least that many tokens
    if count * size > len(text):
        raise ValueError(f"text: {len(text)} bytes given; {count} windows of {context} tokens need {count * size}")
    ids, num_bytes = [], []
    for number in range(count):
        start = text.rfind(b"\n", 0, number * (len(text) - size) // max(count - 1, 1) + 1) + 1
        piece = text[start : start + size]
        if tokenizer is None:
            ids.append([BOUNDARY, *piece])
            num_bytes.append(len(piece))
        else:
            ids.append(tokenizer(piece.decode(errors="ignore"))["input_ids"][:context])
            num_bytes.append(len(tokenizer.decode(ids[-1][1:]).encode()))
    return Windows(torch.tensor(ids), np.array(num_bytes, dtype=np.float64))


def batches(model: PreTrainedModel, windows: Windows) -> tuple[Tensor, ...]:
    """As many windows at a time as keep scores and logits small, on the model's device."""
    config, length = model.config, windows.ids.shape[1]
    scores = SCORES_AT_ONCE[model.device.type] // (config.num_attention_heads * length**2)
    logits = LOGITS_AT_ONCE // (config.vocab_size * length)
    return windows.ids.to(model.device).split(max(1, min(scores, logits)))


@torch.no_grad()
def count_margins(model: PreTrainedModel, windows: Windows, settings: Sequence[Setting]) -> dict[Setting, Tensor]:
    """What every λ would drop of dense attention, see `Margins`."""
    margins = Margins(settings, model.config.num_hidden_layers, model.config.num_attention_heads)
    for ids in batches(model, windows):
        model(input_ids=ids, use_cache=False, logits_to_keep=1, study=margins)
    return margins.counts


@torch.no_grad()
def evaluate(model: PreTrainedModel, windows: Windows, setting: Setting, ln_threshold: Tensor) -> Losses:
    """At ln λ (layers, Hq), -inf for heads that stay dense."""
    parts = []
    for ids in batches(model, windows):
        skip = Skip(setting, ln_threshold.to(ids.device), len(ids))
        logits = model(input_ids=ids, use_cache=False, study=skip).logits[:, :-1]
        # flat: over classes in the middle of a tensor torch sums less exactly
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        nats = nats.view(len(ids), -1).sum(1)
        parts.append(torch.stack([nats.double(), *skip.counts.double()]).cpu())
    return Losses(*torch.cat(parts, 1).numpy())


def bits_per_byte(losses: Losses, windows: Windows) -> float:
    return float(losses.nats.sum() / windows.bytes.sum()) / math.log(2)


class Bootstrap:
    """Differences of losses over the same windows, each with the interval that drawing the windows anew gives."""

    def __init__(self, windows: Windows, seed: int = 0) -> None:
        count = len(windows.bytes)
        draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, REPLICATES)
        self.weights = np.concatenate([np.ones((1, count)), draws])  # the first one is the windows as they are
        self.bytes = self.weights @ windows.bytes

    def bits(self, losses: Losses) -> np.ndarray:
        return self.weights @ losses.nats / self.bytes / math.log(2)

    def shares(self, losses: Losses) -> np.ndarray:
        return self.weights @ losses.dropped / (self.weights @ losses.visited)

    def added(self, losses: Losses, dense: Losses) -> tuple[float, float, float]:
        """Bits per byte, and the interval."""
        return _with_interval(self.bits(losses) - self.bits(dense))

    def against(self, losses: Losses, curve: Sequence[Losses]) -> tuple[float, float, float] | None:
        """Bits per byte more than a curve's at the same share, the curve being a line between its points; None where
        the curve does not reach that share."""
        if losses.share > max(point.share for point in curve) + BEYOND:
            return None
        x, xs = self.shares(losses), np.stack([self.shares(point) for point in curve], 1)
        ys = np.stack([self.bits(point) for point in curve], 1)
        found = [interpolate(*replicate) for replicate in zip(x, xs, ys, strict=True)]
        return _with_interval(self.bits(losses) - np.array(found))


def interpolate(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """On the line through the points, which goes on behind the last one."""
    order = np.argsort(xs, kind="stable")
    xs, ys = xs[order], ys[order]
    if x <= xs[-1] or len(xs) == 1:
        return float(np.interp(x, xs, ys))
    return float(ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))


def _with_interval(replicates: np.ndarray) -> tuple[float, float, float]:
    return (float(replicates[0]), *map(float, np.percentile(replicates[1:], INTERVAL)))
