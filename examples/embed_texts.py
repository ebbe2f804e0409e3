"""Embed texts of different lengths in padded batches, with attention from `fa_ops`, beside eager and sdpa.

The encoder is one that AutoModel loads from a folder (--model), or a small random BERT that reads bytes. A text's
embedding is the mean over its tokens, padding left out, scaled to length 1. The closing table says what was gained in
time; if the embeddings differ from eager's by more than rounding explains, the exit status is 1.
"""

import argparse
import ast
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from textdata import BOUNDARY, VOCAB_SIZE, pad, stdlib_documents
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel

import fa_ops

OURS = "modelopt_triton"
ATTENTIONS = (OURS, "sdpa", "eager")
SEED = 0
ROUNDS = 3
# Of hidden size, layers and heads of the random BERT.
SIZES = {"cpu": (128, 4, 4), "cuda": (768, 12, 12)}
# Between embeddings of length 1, two orders of summation in float32 leave a few roundings for each layer.
LARGEST_DIFFERENCE = 64 * torch.finfo(torch.float32).eps

Batch = Mapping[str, Tensor]


class Result(NamedTuple):
    """Embeddings (texts, D) float32, and the seconds that they took."""

    embeddings: Tensor
    seconds: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a saved encoder with its tokenizer (a random BERT)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="embed its lines (docstrings of Python's library)")
    parser.add_argument("--count", type=int, default=64, help="embed at most so many texts (64)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts in a batch (16)")
    parser.add_argument("--max_length", type=int, default=512, help="cut texts to so many tokens (512)")
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bfloat16 instead of float32")
    arguments = parser.parse_args()
    if arguments.model and not arguments.model.is_dir():
        parser.error(f"--model: got {arguments.model}, accepted is a folder")
    if arguments.text and not arguments.text.is_file():
        parser.error(f"--text: got {arguments.text}, accepted is a file")
    for name, least in (("count", 1), ("batch_size", 1), ("max_length", 2)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: got {getattr(arguments, name)}, accepted is {least} or more")
    return arguments


def docstrings() -> Iterator[str]:
    """Of the standard library's modules and classes, from a line to pages, in an order that mixes the modules."""
    documents = sorted(stdlib_documents())
    for _, source in random.Random(SEED).sample(documents, len(documents)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef):
                yield ast.get_docstring(node) or ""


def load_texts(source: Path | None, count: int) -> list[str]:
    """At most `count` texts that are not empty, each in one line."""
    lines = source.read_text(encoding="utf-8").splitlines() if source else docstrings()
    texts = list(islice(filter(None, (" ".join(line.split()) for line in lines)), count))
    if not texts:
        raise ValueError(f"--text: {source} has only empty lines, accepted is a file with text")
    return texts


def load_tokenizer(folder: Path | None, max_length: int) -> Callable[[list[str]], Batch]:
    """From texts to `input_ids` and `attention_mask`, each (texts, longest of them) int64."""
    if folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        max_length = min(max_length, tokenizer.model_max_length)
        return partial(tokenizer, padding=True, truncation=True, max_length=max_length, return_tensors="pt")

    def to_bytes(texts: list[str]) -> Batch:
        batch = pad([text.encode()[: max_length - 1] for text in texts])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    return to_bytes


def load_model(folder: Path | None, max_length: int, device: torch.device) -> PreTrainedModel:
    """In float32, ready to embed."""
    if folder:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, attn_implementation=OURS)
        return model.to(device).eval()
    hidden_size, num_layers, num_heads = SIZES[device.type]
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_length,
        initializer_range=1 / math.sqrt(hidden_size),  # larger than BERT's, so that attention prefers some tokens
        pad_token_id=BOUNDARY,
        attn_implementation=OURS,
    )
    torch.manual_seed(SEED)
    return BertModel(config, add_pooling_layer=False).to(device).eval()


@torch.no_grad()
def embed(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """(texts, D) float32, of length 1."""
    embeddings = []
    for batch in batches:
        is_valid = batch["attention_mask"].bool()[..., None]  # (texts, tokens, 1)
        hidden = model(**batch).last_hidden_state.float().masked_fill(~is_valid, 0)  # (texts, tokens, D)
        embeddings.append(F.normalize(hidden.sum(1) / is_valid.sum(1), dim=-1))
    return torch.cat(embeddings)


def check_attention(model: PreTrainedModel, batch: Batch) -> None:
    """A model that computes attention by itself, whatever its attn_implementation, would compare equal."""
    with FlopCounterMode(display=False) as counter:
        embed(model, [batch])
    if torch.ops.modelopt.varlen_attention not in counter.get_flop_counts()["Global"]:
        raise ValueError(
            f"--model: {type(model).__name__} does not call {OURS}; accepted is a model that lets attn_implementation "
            "choose its attention"
        )


def measure(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Result]:
    """All texts with each attention, in turns; the fastest of the rounds after the first, which warms up."""
    results: dict[str, Result] = {}
    for round_number in range(1 + ROUNDS):
        for attention in ATTENTIONS:
            model.set_attn_implementation(attention)
            start = time.perf_counter()
            embeddings = embed(model, batches).cpu()
            seconds = time.perf_counter() - start
            if round_number > 1:
                seconds = min(seconds, results[attention].seconds)
            results[attention] = Result(embeddings, seconds)
    return results


def largest_difference(embeddings: Tensor, expected: Tensor) -> float:
    """NaN if any component is."""
    return (embeddings - expected).abs().max().item()


def report(results: dict[str, Result], expected: Tensor) -> int:
    """Prints the table, and returns the exit status.

    `expected` is eager's in float32. In bfloat16 eager is off too, and ours may be off twice as far.
    """
    print(f"\n{'attention':<16} {'texts/s':>9} {'gain':>6} {'largest difference':>19} {'smallest cosine':>16}")
    for attention, (embeddings, seconds) in results.items():
        gain = seconds / results[OURS].seconds
        difference = largest_difference(embeddings, expected)
        cosine = F.cosine_similarity(embeddings, expected).min().item()
        print(
            f"{attention:<16} {len(expected) / seconds:>9,.1f} {gain:>5.2f}x {difference:>19.1e} {cosine:>16.7f}",
        )
    print(f"(gain of {OURS} over each; differences from eager in float32)")
    difference = largest_difference(results[OURS].embeddings, expected)
    bar = LARGEST_DIFFERENCE + 2 * largest_difference(results["eager"].embeddings, expected)
    print(f"largest difference of {OURS}  {difference:.1e}  ≤ {bar:.1e}  {'ok' if difference <= bar else 'MISSED'}")
    return 0 if difference <= bar else 1


def run(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if fa_ops.IS_AVAILABLE and torch.cuda.is_available() else "cpu")
    texts = load_texts(arguments.text, arguments.count)
    tokenize = load_tokenizer(arguments.model, arguments.max_length)
    model = load_model(arguments.model, arguments.max_length, device)
    starts = range(0, len(texts), arguments.batch_size)
    tokenized = [tokenize(texts[start : start + arguments.batch_size]) for start in starts]
    batches: list[Batch] = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in tokenized]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in tokenized])
    padding = 1 - lengths.sum().item() / sum(batch["attention_mask"].numel() for batch in tokenized)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    print(
        f"{len(texts)} texts of {lengths.min()} to {lengths.max()} tokens in batches of {arguments.batch_size}, "
        f"{padding:.0%} padding; {type(model).__name__}, {model.num_parameters() / 1e6:.1f} million parameters, "
        f"{str(dtype).removeprefix('torch.')} on {device.type}"
    )
    check_attention(model, batches[0])
    model.set_attn_implementation("eager")
    expected = embed(model, batches).cpu()
    return report(measure(model.to(dtype), batches), expected)


if __name__ == "__main__":
    options = parse_arguments()
    fa_ops.register_triton_attention()
    sys.exit(run(options))
