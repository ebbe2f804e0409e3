"""Whether a calibration reaches its targets on texts and lengths that it never saw; exit status 1 if it misses.

    python -m tests.sparsity.held_out examples/output/model
    python -m tests.sparsity.held_out DIR --device cuda --installed --br 64 --bc 128 --calibrated 4096 \
        --lengths 4096 2048 8192 --windows 192 --batch 24 --decoded 8 --output FILE.md

By default the model is that of examples/train_small_lm.py: byte-level, context 512. It is calibrated at 256 tokens of
the text that it was trained on, and measured on held-out files at 128, 256 and 512, prefill and decoding. The second
line is for the model of examples/benchmarks/sparsity_study.py --train, and the text of that. A target that no λ reaches
at a length is shown, and not judged.

Behind a share stands its standard error, in points, from the shares of the batches. Decoding is measured at --decoded
tokens that are spread over the last key block of a window, since the number of keys in it matters; what lies between
them is filled in by short prefills.
"""

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import state_of
from fa_ops.sparsity.config import PHASES
from fa_ops.sparsity.curves import MOST_THRESHOLD

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from textdata import Document, split_held_out, stdlib_documents

TARGETS = (0.2, 0.3, 0.5, 0.7)
TOLERANCE = 0.02
TRAINING_BYTES = 2_000_000

Shares = dict[str, list[float]]  # by phase, one of each batch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--installed", action="store_true", help="the text is that of the sparsity study's own model")
    parser.add_argument("--br", type=int, default=16, help="query rows of a block (16)")
    parser.add_argument("--bc", type=int, default=16, help="keys of a block (16)")
    parser.add_argument("--calibrated", type=int, default=256, help="tokens of the texts calibrated with (256)")
    parser.add_argument("--lengths", type=int, nargs="+", default=(128, 256, 512), help="tokens of those checked")
    parser.add_argument("--windows", type=int, default=320, help="held-out texts of each length (320)")
    parser.add_argument("--batch", type=int, default=64, help="texts at a time (64)")
    parser.add_argument("--decoded", type=int, default=16, help="tokens of each text, a divisor of --bc (16)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn from the training files (0)")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    if arguments.bc % arguments.decoded:
        parser.error(f"--decoded: {arguments.decoded} given, accepted are divisors of --bc, {arguments.bc}")
    return arguments


def documents(is_installed: bool) -> tuple[list[Document], list[Document]]:
    """(training, held out)"""
    if not is_installed:
        return split_held_out(stdlib_documents())
    sys.path.insert(1, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import study_train

    return split_held_out(study_train.documents(None, with_installed=True))


def training_text(training: list[Document], seed: int) -> list[Tensor]:
    shuffled = random.Random(seed).sample(training, len(training))
    texts, size = [], 0
    for _, text in shuffled:
        texts.append(as_ids(text))
        size += len(text)
        if size > TRAINING_BYTES:
            break
    return texts


def as_ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows_of(text: Tensor, length: int, number: int) -> Tensor:
    rng = random.Random(length)
    begins = [rng.randrange(len(text) - length) for _ in range(number)]
    return torch.stack([text[begin : begin + length] for begin in begins]).long()


@torch.no_grad()
def shares(model: torch.nn.Module, windows: Tensor, batch: int, bc: int, decoded: int) -> Shares:
    """Dropped of whole windows, and in decoding of tokens in their last key block."""
    found: Shares = {phase: [] for phase in PHASES}
    for ids in windows.split(batch):
        with mtsa.collect_stats(model):
            model(ids, use_cache=False, logits_to_keep=1)
        found["prefill"].append(mtsa.dropped_share(model, "prefill"))
        with mtsa.collect_stats(model):
            cache = None
            for piece in pieces(ids, bc, decoded):
                cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        found["decode"].append(mtsa.dropped_share(model, "decode"))
    return found


def pieces(ids: Tensor, bc: int, decoded: int) -> Iterator[Tensor]:
    """All of the ids; those of one token are decoding steps."""
    yield ids[:, :-bc]
    for part in ids[:, -bc:].split(bc // decoded, dim=1):
        if part.shape[1] > 1:
            yield part[:, :-1]
        yield part[:, -1:]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error; NaN of one batch."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def main() -> int:
    arguments = parse_arguments()
    training, held_out = documents(arguments.installed)
    text = as_ids(b"".join(text for _, text in held_out))
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    fields = {"backend": "triton", "br": arguments.br, "bc": arguments.bc}
    calibration = {
        "max_seqlen": arguments.calibrated,
        "target_sparse_ratio": dict.fromkeys(PHASES, TARGETS[0]),
    }
    begin = time.perf_counter()
    mtsa.sparsify(
        model, {"sparse_cfg": {"*attn*": fields, "calibration": calibration}}, training_text(training, arguments.seed)
    )
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    lines = [
        f"Blocks of {arguments.br} × {arguments.bc}, calibrated at {arguments.calibrated} tokens in "
        f"{time.perf_counter() - begin:.0f} s; {dtype} on {device}. Checked on {arguments.windows} held-out texts of "
        f"each length, {arguments.decoded} decoded tokens of each; in brackets the difference from the target and the "
        "standard error, in points.",
        "",
        "| tokens | target | prefill | decode |",
        "|--:|--:|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    fits = {phase: own.fit for phase, own in state_of(model).calibration.items()}
    num_missed = 0
    for length in arguments.lengths:
        windows = windows_of(text, length, arguments.windows).to(arguments.device)
        for target in TARGETS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of targets above what the calibrated length reaches
                mtsa.set_target_sparse_ratio(model, dict.fromkeys(PHASES, target))
            cells = []
            measured = shares(model, windows, arguments.batch, arguments.bc, arguments.decoded)
            for phase, of_batches in measured.items():
                share, error = mean_and_error(of_batches)
                is_reached = fits[phase].with_target(target).threshold(length) < MOST_THRESHOLD
                is_missed = is_reached and abs(share - target) > TOLERANCE
                num_missed += is_missed
                verdict = "MISSED" if is_missed else "ok" if is_reached else "not reachable"
                cells.append(f"{share:.1%} ({100 * (share - target):+.1f} ± {100 * error:.1f}) {verdict}")
            lines.append(f"| {length} | {target:.0%} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            if arguments.output is not None:
                arguments.output.write_text("\n".join(lines) + "\n")
    print(f"\n{num_missed} missed by more than {TOLERANCE:.0%}; {time.perf_counter() - begin:.0f} s")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
