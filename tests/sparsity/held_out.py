"""Whether a calibration reaches its targets on texts and lengths that it never saw; exit status 1 if it misses.

    python -m tests.sparsity.held_out examples/output/model

The model is that of examples/train_small_lm.py: byte-level, context 512. It is calibrated at 256 tokens of the text
that it was trained on, and measured on held-out files at 128, 256 and 512, prefill and decoding. A target that no λ
reaches at a length is shown, and not judged.
"""

import argparse
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import state_of
from fa_ops.sparsity.config import PHASES
from fa_ops.sparsity.curves import MOST_THRESHOLD

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from textdata import split_held_out, stdlib_documents

TARGETS = (0.2, 0.3, 0.5, 0.7)
LENGTHS = (128, 256, 512)
TOLERANCE = 0.02
TRAINING_BYTES = 2_000_000
BATCH = 64
DECODED = 16  # tokens, a key block of them


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=320, help="held-out texts of each length (320)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn from the training files (0)")
    return parser.parse_args()


def training_text(seed: int) -> list[list[int]]:
    documents = split_held_out(stdlib_documents())[0]
    random.Random(seed).shuffle(documents)
    texts, size = [], 0
    for _, text in documents:
        texts.append(list(text))
        size += len(text)
        if size > TRAINING_BYTES:
            break
    return texts


def held_out_windows(length: int, number: int) -> Tensor:
    text = torch.cat([torch.tensor(list(text)) for _, text in split_held_out(stdlib_documents())[1]])
    rng = random.Random(length)
    begins = [rng.randrange(len(text) - length) for _ in range(number)]
    return torch.stack([text[begin : begin + length] for begin in begins])


@torch.no_grad()
def shares(model: torch.nn.Module, windows: Tensor) -> dict[str, float]:
    """Dropped of whole windows, and in decoding of their last tokens."""
    with mtsa.collect_stats(model):
        for ids in windows.split(BATCH):
            model(ids, use_cache=False)
    prefill = mtsa.dropped_share(model, "prefill")
    with mtsa.collect_stats(model):
        for ids in windows.split(BATCH):
            cache = model(ids[:, :-DECODED]).past_key_values
            for token in ids[:, -DECODED:].split(1, dim=1):
                cache = model(token, past_key_values=cache).past_key_values
    return {"prefill": prefill, "decode": mtsa.dropped_share(model, "decode")}


def main() -> int:
    arguments = parse_arguments()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    fields = {"backend": "triton", "br": 16, "bc": 16}
    calibration = {"max_seqlen": 256, "target_sparse_ratio": dict.fromkeys(PHASES, TARGETS[0])}
    begin = time.perf_counter()
    mtsa.sparsify(model, {"sparse_cfg": {"*attn*": fields, "calibration": calibration}}, training_text(arguments.seed))
    print(f"calibrated at 256 tokens in {time.perf_counter() - begin:.0f} s")
    fits = {phase: own.fit for phase, own in state_of(model).calibration.items()}
    num_missed = 0
    for length in LENGTHS:
        windows = held_out_windows(length, arguments.windows)
        for target in TARGETS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of targets above what 256 tokens reach
                mtsa.set_target_sparse_ratio(model, dict.fromkeys(PHASES, target))
            cells = []
            for phase, share in shares(model, windows).items():
                is_reached = fits[phase].with_target(target).threshold(length) < MOST_THRESHOLD
                is_missed = is_reached and abs(share - target) > TOLERANCE
                num_missed += is_missed
                verdict = "MISSED" if is_missed else "ok" if is_reached else "not reachable"
                cells.append(f"{phase} {share:6.1%} {100 * (share - target):+5.1f} {verdict:<13}")
            print(f"length {length:>4}, target {target:.0%}: {' | '.join(cells)}", flush=True)
    print(f"{num_missed} missed by more than {TOLERANCE:.0%}")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
