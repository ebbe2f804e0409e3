"""Runs a model over texts, for calibration."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fa_ops.sparsity.config import CalibrationConfig

TokenIds = Sequence[int] | Tensor
Texts = Callable[[nn.Module], Any] | Iterable[str] | Iterable[TokenIds]

# Fewer blocks than this cannot drop enough to tell how λ acts.
LEAST_BLOCKS = 8


def lengths_of(model: nn.Module, config: CalibrationConfig, block: int) -> list[int]:
    """Lengths to run, descending: the longest that configuration and model allow, half of it, and so on; for a causal
    model the longest alone, whose query blocks are the ends of all shorter ones."""
    longest = config.max_seqlen
    model_limit = getattr(_text_config(model), "max_position_embeddings", None)
    if model_limit is not None:
        longest = min(longest, model_limit)
    if _decodes(model):
        return [longest]
    lengths = [longest >> halvings for halvings in range(config.num_length_bins)]
    return [longest, *(length for length in lengths[1:] if length >= LEAST_BLOCKS * block)]


def token_windows(
    texts: Iterable[str] | Iterable[TokenIds],
    tokenizer: Any,
    vocab_size: int,
    config: CalibrationConfig,
    lengths: list[int],
) -> list[Tensor]:
    """Pieces of all texts joined, (length,) int64 each, spread over them, lengths in turn."""
    stream = torch.cat(
        [_token_ids(text, tokenizer, vocab_size) for text in texts] or [torch.empty(0, dtype=torch.int64)]
    )
    if len(stream) < lengths[0]:
        raise ValueError(
            f"forward_loop: {len(stream)} tokens given; max_seqlen needs {lengths[0]}: give more text, or a smaller "
            "max_seqlen"
        )
    samples = max(config.samples, len(lengths), min(config.min_tokens, len(stream)) // lengths[0])
    windows = []
    for number in range(samples):
        size = lengths[number % len(lengths)]
        begin = number * (len(stream) - size) // max(samples - 1, 1)
        windows.append(stream[begin : begin + size])
    return windows


def run_window(model: nn.Module, ids: Tensor, chunk_size: int) -> None:
    """The window's prefill, in chunks into a cache; a model that does not decode runs it in one."""
    ids = ids.to(next(model.parameters()).device)[None]
    if not _decodes(model):
        model(input_ids=ids)
        return
    options: dict[str, Any] = {"use_cache": True, "past_key_values": None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    for piece in ids.split(chunk_size, dim=1):
        options["past_key_values"] = model(input_ids=piece, **options).past_key_values


def vocab_size_of(model: nn.Module) -> int:
    return _text_config(model).vocab_size


def progress(items: Sequence[Any], description: str) -> Iterator[Any]:
    """The items, with a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=description, unit="text"))


def _decodes(model: Any) -> bool:
    return model.can_generate() and not model.config.is_encoder_decoder


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _token_ids(text: str | TokenIds, tokenizer: Any, vocab_size: int) -> Tensor:
    if isinstance(text, str):
        given = list(text.encode()) if tokenizer is None else list(tokenizer(text)["input_ids"])
        ids = torch.tensor(given, dtype=torch.int64)
    else:
        ids = torch.as_tensor(text)
    ids = ids.to(torch.int64)
    if ids.ndim != 1:
        raise ValueError(f"forward_loop: token ids of shape {tuple(ids.shape)} given; expected (tokens,) for each text")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        kind = "bytes of a text" if isinstance(text, str) and tokenizer is None else "token ids"
        raise ValueError(
            f"forward_loop: {kind} from {int(ids.min())} to {int(ids.max())} given; the vocabulary has {vocab_size}"
            + ("; give a tokenizer" if kind.startswith("bytes") else "")
        )
    return ids
