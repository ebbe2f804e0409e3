"""Runs a model over texts of several lengths, prefill and decoding, for calibration."""

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
    """Lengths to run, descending: the longest that configuration and model allow, half of it, and so on."""
    longest = config.max_seqlen
    model_limit = getattr(_text_config(model), "max_position_embeddings", None)
    if model_limit is not None:
        longest = min(longest, model_limit - config.num_decode_tokens)
    lengths = [longest >> halvings for halvings in range(config.num_length_bins)]
    return [longest, *(length for length in lengths[1:] if length >= LEAST_BLOCKS * block)]


def token_windows(
    texts: Iterable[str] | Iterable[TokenIds],
    tokenizer: Any,
    vocab_size: int,
    config: CalibrationConfig,
    lengths: list[int],
) -> list[Tensor]:
    """Pieces of all texts joined, (length + num_decode_tokens,) int64 each, spread over them, lengths in turn."""
    stream = torch.cat(
        [_token_ids(text, tokenizer, vocab_size) for text in texts] or [torch.empty(0, dtype=torch.int64)]
    )
    needed = lengths[0] + config.num_decode_tokens
    if len(stream) < needed:
        raise ValueError(
            f"forward_loop: {len(stream)} tokens given; max_seqlen {lengths[0]} and num_decode_tokens "
            f"{config.num_decode_tokens} need {needed}: give more text, or a smaller max_seqlen"
        )
    samples = max(config.samples, len(lengths))
    windows = []
    for number in range(samples):
        size = lengths[number % len(lengths)] + config.num_decode_tokens
        begin = number * (len(stream) - size) // max(samples - 1, 1)
        windows.append(stream[begin : begin + size])
    return windows


def run_window(model: nn.Module, ids: Tensor, num_decode_tokens: int, chunk_size: int) -> None:
    """Prefill in chunks into a cache, then decode the window's last tokens one by one.

    A model that does not decode runs the prefill alone, in one.
    """
    ids = ids.to(next(model.parameters()).device)[None]
    prefill = ids.shape[1] - num_decode_tokens
    if not _decodes(model):
        model(input_ids=ids[:, :prefill])
        return
    options: dict[str, Any] = {"use_cache": True, "past_key_values": None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    for piece in (*ids[:, :prefill].split(chunk_size, dim=1), *ids[:, prefill:].split(1, dim=1)):
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
        ids = torch.tensor(list(text.encode()) if tokenizer is None else list(tokenizer(text)["input_ids"]))
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
