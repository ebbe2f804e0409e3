"""Text as bytes, for models without a tokenizer: documents, a fixed held-out split, padded batches.

Token i < 256 is byte i. ``BOUNDARY`` begins every piece of text, so that its first byte is predicted too, and pads.
"""

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

BOUNDARY = 256
VOCAB_SIZE = 264  # 257, and seven unused: matrix units and Inductor like multiples of 8

# Installed packages and test suites are not the library, and the tables in the last two are too easy to predict.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Where the demo leaves its model, below this folder or one that --output names.
OUTPUT = Path(__file__).parent / "output"
MODEL = "model"

HELD_OUT_SHARE = 0.04
PART_BYTES = 16384

Document = tuple[str, bytes]


def stdlib_documents() -> list[Document]:
    """The source files of the running Python's standard library, as (name, text)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())  # no dangling links
    return [(name.as_posix(), (root / name).read_bytes()) for name in names if not STDLIB_LEFT_OUT & set(name.parts)]


def text_documents(source: Path) -> list[Document]:
    """The text files under a folder (binary and hidden ones are no text), or one file in parts of 16 KiB."""
    if source.is_file():
        text = source.read_bytes()
        parts = cut(text, PART_BYTES)
        return [(f"{source.name}:{number}", part) for number, part in enumerate(parts)]
    if not source.is_dir():
        raise FileNotFoundError(f"text: {source} is neither a file nor a folder")
    names = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    visible = (name for name in names if not any(part.startswith(".") for part in name.parts))
    documents = ((name.as_posix(), (source / name).read_bytes()) for name in visible)
    return [(name, text) for name, text in documents if b"\0" not in text]


def split_held_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out). The hash of a document's name decides, so the split is the same on every machine."""

    def draw(document: Document) -> float:
        return int.from_bytes(hashlib.sha256(document[0].encode()).digest()[:8], "big") / 2**64

    documents = sorted((document for document in documents if document[1]), key=draw)
    count = max(1, sum(draw(document) < HELD_OUT_SHARE for document in documents))
    if len(documents) <= count:
        raise ValueError(f"text: {len(documents)} non-empty documents; training and a held-out part need two or more")
    return documents[count:], documents[:count]


def cut(text: bytes, size: int) -> list[bytes]:
    """Pieces of at most `size` bytes that end at a line's end wherever a line's end is in reach."""
    pieces = []
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return pieces


def pad(pieces: list[bytes], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (pieces, longest piece + 1) int64, padded on the right."""
    width = max(map(len, pieces)) + 1
    input_ids = torch.full((len(pieces), width), BOUNDARY)
    lengths = torch.tensor([len(piece) + 1 for piece in pieces])
    for row, piece in zip(input_ids, pieces, strict=True):
        row[1 : len(piece) + 1] = torch.tensor(list(piece), dtype=torch.long)
    attention_mask = (torch.arange(width) < lengths[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def by_length(pieces: list[bytes], batch_size: int) -> list[list[bytes]]:
    """Batches of pieces of similar length. Empty pieces, which have no byte to predict, fill up the last one."""
    pieces = sorted(pieces, key=len)
    pieces += [b""] * (-len(pieces) % batch_size)
    return [pieces[i : i + batch_size] for i in range(0, len(pieces), batch_size)]


def training_batches(pieces: list[bytes], batch_size: int, seed: int) -> Iterator[list[bytes]]:
    """Endless. Each round shuffles the pieces, buckets them by length in pools, and shuffles each pool's batches."""
    shuffle = random.Random(seed)
    pool = 64 * batch_size
    while True:
        shuffled = shuffle.sample(pieces, len(pieces))
        for start in range(0, len(shuffled), pool):
            batches = by_length(shuffled[start : start + pool], batch_size)
            shuffle.shuffle(batches)
            yield from batches
