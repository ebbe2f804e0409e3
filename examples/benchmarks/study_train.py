"""The model of the sparsity study on a GPU: a byte-level Llama of 34 million parameters with a context of 8,192.

It learns the Python sources that are installed beside it, joined, so that windows are full and hold several files. It
is trained through `fa_ops`, as examples/train_small_lm.py trains its own.
"""

import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import train_small_lm
from textdata import Document, cut, split_held_out, stdlib_documents, text_documents, training_batches

import fa_ops

PRESET = train_small_lm.Preset(512, 1408, 12, 8, 2, context=8192, batch_size=4, learning_rate=1e-3)
MOST_BYTES = 1 << 28  # of text: more than ten minutes can read


@cache
def documents(source: Path | None, with_installed: bool) -> list[Document]:
    """Of a file or folder, or the standard library's; with_installed adds the sources of the installed packages."""
    if source is not None:
        return text_documents(source)
    found = stdlib_documents()
    if with_installed:
        root, size = Path(sysconfig.get_paths()["purelib"]), 0
        for path in filter(Path.is_file, sorted(root.rglob("*.py"))):
            size += path.stat().st_size
            if size > MOST_BYTES:
                break
            found.append((path.relative_to(root).as_posix(), path.read_bytes()))
    return found


def train(source: Path | None, output: Path, preset: train_small_lm.Preset, minutes: float, steps: int | None) -> float:
    """Trains for so many minutes, or steps, and saves the model; returns the bits per byte of the last steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fa_ops.register_triton_attention()
    training, _ = split_held_out(documents(source, with_installed=True))
    pieces = cut(b"\n".join(text for _, text in training), preset.context - 1)
    print(f"training on {sum(map(len, pieces)) / 1e6:.1f} MB", file=sys.stderr)
    model = train_small_lm.build_model(preset, preset.context, train_small_lm.ATTENTION, device)

    def batches() -> Iterator[list[bytes]]:
        return training_batches(pieces, preset.batch_size, train_small_lm.SEED)

    compiled = torch.compile(model, fullgraph=True)
    history = train_small_lm.train(compiled, batches(), preset, minutes, steps, float32_steps=0)
    model.config.study_training = (
        f"{len(history.losses)} steps over {sum(history.tokens) / 1e6:.1f} MB of {sum(map(len, pieces)) / 1e6:.1f} MB "
        f"of text in {history.seconds[-1]:.0f} s, the first step {history.seconds[0]:.0f} s"
    )
    model.save_pretrained(output)
    print(f"{model.config.study_training}; {history.tokens_per_second():,.0f} bytes per second", file=sys.stderr)
    last = history.losses[-50:]
    return sum(last) / len(last) / torch.log(torch.tensor(2.0)).item()
