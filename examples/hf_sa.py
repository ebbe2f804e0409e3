"""Make the attention of a language model sparse with skip-softmax, and see what it costs and what it gains.

The model runs dense, with the attention that it loads with, and then sparse: what it writes, its loss on held-out text,
the share of blocks that prefill and decoding drop beside the share that was wanted, and the time that both take.
Pictures show the share by layer and head, the calibration, and the loss against the share. With --export_dir the sparse
model is saved, loaded again and compared; if it is not the same bit for bit, the exit status is 1.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from textdata import BOUNDARY, MODEL, OUTPUT, split_held_out, stdlib_documents, text_documents
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fa_ops
import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.config import BACKENDS, PHASES, CalibrationConfig, FlashSkipSoftmaxConfig
from fa_ops_meta.skip import BLOCK_SIZES

CALIBRATED = "skip_softmax_calib"
SPARSE_ATTENTIONS = {"skip_softmax": mtsa.SKIP_SOFTMAX_DEFAULT, CALIBRATED: mtsa.SKIP_SOFTMAX_CALIB}
CALIBRATION_FLAGS = ("target_sparse_ratio", "calib_samples", "calib_max_seqlen", "calib_chunk_size")
SEED = 0
ROUNDS = 3
# Shorter contexts have too few blocks of the library's size to leave any out, and get small ones.
LONG_CONTEXT = 2048
SHORT_BLOCK = (16, 16)
# Tokens to measure the loss on, and logits that are held at a time.
MEASURED_TOKENS = 1 << 14
LOGITS_AT_ONCE = 1 << 28
LARGEST_BATCH = 8
SHOWN_PROMPT = 60
DOCUMENTS_PER_SAMPLE = 4
# Of the picture of loss against share.
QUALITY_TARGETS = (0.1, 0.3, 0.5, 0.7)
QUALITY_THRESHOLDS = (0.01, 0.03, 0.1, 0.3)


class Tokenizer(NamedTuple):
    """`encode` begins a text as the model learnt it; `saved` is Transformers' tokenizer, None for bytes."""

    encode: Callable[[bytes], list[int]]
    decode: Callable[[list[int]], str]
    saved: Any = None


class Text(NamedTuple):
    """Documents to calibrate on, and (windows, seq_len) held-out tokens to measure on."""

    calibration: list[list[int]]
    held_out: Tensor


class Unit(NamedTuple):
    """Of a loss."""

    name: str
    per_nat: float


class Behaviour(NamedTuple):
    """Dense or sparse, by phase: nats per token, and seconds of a prefill and of a decoding step. What it writes."""

    losses: list[float]
    seconds: list[float]
    continuation: list[int]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pyt_ckpt_path", type=Path, default=OUTPUT / MODEL, metavar="DIR", help="a saved model (that of `make demo`)")
    add("--sparse_attn", choices=SPARSE_ATTENTIONS, default="skip_softmax", help="the preset (skip_softmax)")
    add("--backend", choices=BACKENDS, default="pytorch", help="pytorch: plain torch, slow; triton: the op (pytorch)")
    add("--br", type=int, choices=BLOCK_SIZES, help="query rows of a block (64; 16 for less than 2048 tokens)")
    add("--bc", type=int, choices=BLOCK_SIZES, help="keys of a block (128; 16 for less than 2048 tokens)")
    add("--seq_len", type=int, default=2048, help="tokens that are measured at a time, at most the model's own (2048)")
    add("--max_new_tokens", type=int, default=50, help="tokens to generate, and to decode in a measurement (50)")
    add("--do_sample", action="store_true", help="draw the tokens, instead of taking the likeliest")
    add("--temperature", type=float, default=0.7, help="of --do_sample (0.7)")
    add("--target_sparse_ratio", type=float, help="calibrate to this share of blocks dropped, in (0, 1) (0.5)")
    add("--calib_samples", type=int, help="texts to calibrate on (24)")
    add("--calib_max_seqlen", type=int, help="tokens of the longest of them (those of --seq_len)")
    add("--calib_chunk_size", type=int, help="tokens that calibration runs at a time (2048)")
    add("--text", type=Path, metavar="FILE_OR_DIR", help="calibrate and measure on this (Python's standard library)")
    add("--export_dir", type=Path, metavar="DIR", help="save the sparse model there, load it again and compare")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="folder of the pictures (examples/output)")
    return parser


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_args(given)
    if not (arguments.pyt_ckpt_path / "config.json").is_file():
        parser.error(
            f"--pyt_ckpt_path: got {arguments.pyt_ckpt_path}, accepted is a folder with a saved model; "
            f"`make demo` trains the one in {OUTPUT / MODEL}"
        )
    if arguments.text and not arguments.text.exists():
        parser.error(f"--text: got {arguments.text}, accepted is a file or a folder")
    for name in ("seq_len", "max_new_tokens", "calib_samples", "calib_max_seqlen", "calib_chunk_size"):
        value, least = getattr(arguments, name), 2 if name == "max_new_tokens" else 1
        if value is not None and value < least:
            parser.error(f"--{name}: got {value}, accepted is {least} or more")
    if arguments.temperature <= 0:
        parser.error(f"--temperature: got {arguments.temperature}, accepted is a positive number")
    target = arguments.target_sparse_ratio
    if target is not None and not 0 < target < 1:
        parser.error(f"--target_sparse_ratio: got {target}, accepted is a number in (0, 1)")
    for name in CALIBRATION_FLAGS:
        if getattr(arguments, name) is not None and arguments.sparse_attn != CALIBRATED:
            parser.error(f"--{name}: calibrates, accepted is --sparse_attn {CALIBRATED} with it")
    return arguments


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """With the attention that Transformers chooses: `sparsify` sets its own."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").to(device).eval()


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """A checkpoint without a tokenizer is byte-level."""
    if any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return Tokenizer(
            lambda text: tokenizer(text.decode(errors="replace"))["input_ids"],
            lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            tokenizer,
        )
    if vocab_size <= BOUNDARY:
        raise ValueError(
            f"--pyt_ckpt_path: {folder} has no tokenizer, and a vocabulary of {vocab_size}; accepted without one is a "
            f"byte-level model, of {BOUNDARY + 1} tokens or more"
        )
    return Tokenizer(
        lambda text: [BOUNDARY, *text],
        lambda tokens: bytes(token for token in tokens if token < 256).decode(errors="replace"),
    )


def load_text(source: Path | None, tokenizer: Tokenizer, seq_len: int, samples: int) -> Text:
    """The demo's split: what is measured, its model has not learnt, and calibration does not see."""
    training, held_out = split_held_out(text_documents(source) if source else stdlib_documents())
    tokens = torch.tensor([token for _, text in held_out for token in tokenizer.encode(text)])
    if len(tokens) < seq_len:
        raise ValueError(f"--text: {len(tokens)} tokens are held out, accepted are --seq_len={seq_len} or more")
    count = max(1, min(MEASURED_TOKENS, len(tokens)) // seq_len)
    starts = [number * (len(tokens) - seq_len) // max(count - 1, 1) for number in range(count)]
    windows = torch.stack([tokens[start : start + seq_len] for start in starts])
    calibration = [tokenizer.encode(text) for _, text in training[: samples * DOCUMENTS_PER_SAMPLE]]
    return Text(calibration, windows)


def sparse_config(arguments: argparse.Namespace, block: tuple[int, int], seq_len: int) -> dict[str, Any]:
    """The preset, with what the flags change in it."""
    sparse_cfg = copy.deepcopy(SPARSE_ATTENTIONS[arguments.sparse_attn]["sparse_cfg"])
    sparse_cfg["*"] |= {"backend": arguments.backend, "br": block[0], "bc": block[1]}
    if "calibration" in sparse_cfg:
        target = arguments.target_sparse_ratio
        given = {
            "target_sparse_ratio": None if target is None else dict.fromkeys(PHASES, target),
            "samples": arguments.calib_samples,
            "max_seqlen": arguments.calib_max_seqlen or seq_len,
            "chunk_size": arguments.calib_chunk_size,
        }
        sparse_cfg["calibration"] |= {name: value for name, value in given.items() if value is not None}
    return {"sparse_cfg": sparse_cfg}


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, num_decoded: int) -> Iterator[Tensor]:
    """Of (B, tokens): the logits (B, tokens - num_decoded, vocabulary) of a prefill, then (B, 1, vocabulary) of each
    token that is decoded behind it."""
    cache = None
    for piece in (ids[:, :-num_decoded], *ids[:, -num_decoded:].split(1, dim=1)):
        result = model(piece, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        yield result.logits


def measure_losses(
    model: PreTrainedModel, batches: list[Tensor], max_new_tokens: int, with_decoding: bool = True
) -> list[float]:
    """In nats per token: of the prefill of windows, and of their last tokens, which are decoded one by one."""
    phases = PHASES if with_decoding else PHASES[:1]
    nats, tokens = [0.0] * len(phases), [0] * len(phases)
    for ids in batches:
        end = 0
        calls = logits_of(model, ids[:, :-1], max_new_tokens - 1)
        for call, logits in enumerate(calls if with_decoding else islice(calls, 1)):
            start, end = end, end + logits.shape[1]
            labels = ids[:, start + 1 : end + 1]
            phase = min(call, 1)
            nats[phase] += F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").item()
            tokens[phase] += labels.numel()
    return [own / count for own, count in zip(nats, tokens, strict=True)]


def measure_seconds(model: PreTrainedModel, ids: Tensor, num_decoded: int) -> list[float]:
    """Of a prefill and of a decoding step, the fastest of the rounds after the first, which warms up."""
    rounds = []
    for _ in range(1 + ROUNDS):
        ends = [time.perf_counter()]
        for _ in logits_of(model, ids, num_decoded):
            if ids.is_cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
        rounds.append((ends[1] - ends[0], (ends[-1] - ends[1]) / num_decoded))
    return [min(own) for own in zip(*rounds[1:], strict=True)]


def generate(model: PreTrainedModel, prompt: Tensor, arguments: argparse.Namespace) -> list[int]:
    """The tokens behind the prompt (1, tokens); dense and sparse draw with the same random numbers."""
    torch.manual_seed(SEED)
    options = {"do_sample": True, "temperature": arguments.temperature} if arguments.do_sample else {"do_sample": False}
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=arguments.max_new_tokens, **options
    )
    return tokens[0, prompt.shape[1] :].tolist()


def observe(model: PreTrainedModel, batches: list[Tensor], arguments: argparse.Namespace) -> Behaviour:
    """Blocks are counted where the losses are measured, and only there."""
    max_new_tokens = arguments.max_new_tokens
    with mtsa.collect_stats(model) if mtsa.is_attn_sparsified(model) else nullcontext():
        losses = measure_losses(model, batches, max_new_tokens)
    seconds = measure_seconds(model, batches[0], max_new_tokens)
    return Behaviour(losses, seconds, generate(model, prompt_of(batches, max_new_tokens), arguments))


def prompt_of(batches: list[Tensor], max_new_tokens: int) -> Tensor:
    """(1, tokens): most of a window in the middle."""
    return batches[len(batches) // 2][:1, :-max_new_tokens]


def measure_quality(
    model: PreTrainedModel, batches: list[Tensor], max_new_tokens: int
) -> tuple[list[float], list[float]]:
    """(shares, losses) of prefills at several targets, or at several λ of a model that is not calibrated, which stays
    as it is."""
    rule = rules_of(model)["prefill"]
    if "target" in rule:
        change, values, before = mtsa.set_target_sparse_ratio, QUALITY_TARGETS, rule["target"]
    else:
        change, values, before = mtsa.set_thresholds, QUALITY_THRESHOLDS, rule["thresholds"]
    shares, losses = [], []
    for value in values:
        change(model, {"prefill": value})
        with mtsa.collect_stats(model):
            losses += measure_losses(model, batches, max_new_tokens, with_decoding=False)
        shares.append(mtsa.dropped_share(model, "prefill"))
    change(model, {"prefill": before})
    return shares, losses


def rules_of(model: PreTrainedModel) -> dict[str, Any]:
    """What decides in each phase, the same in all modules."""
    return next(iter(sparse_methods(model).values())).get_threshold_info()


def export(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, ids: Tensor, num_decoded: int) -> bool:
    """Saves the model, loads it again, restores its sparse attention, and returns whether it is the same to the bit."""
    for own in (model, tokenizer.saved):
        if own is not None:
            own.save_pretrained(folder)
    logits, counts = [], []
    for each in (model, mtsa.restore_sparse_attention(load_model(folder, model.device))):
        with mtsa.collect_stats(each):
            logits.append(torch.cat(list(logits_of(each, ids, num_decoded)), dim=1))
        counts.append(torch.stack(list(mtsa.block_counts(each).values())))
    is_same = torch.equal(*logits) and torch.equal(*counts)
    visited, dropped = counts[1].sum((0, 1, 3)).tolist()
    verdict = "the same logits and dropped blocks to the bit" if is_same else "NOT the same logits and dropped blocks"
    print(f"wrote {folder}: loaded again and restored, {verdict}; {dropped:,} of {visited:,} blocks dropped")
    return is_same


def draw(
    model: PreTrainedModel, dense: Behaviour, batches: list[Tensor], max_new_tokens: int, unit: Unit, folder: Path
) -> None:
    """The pictures, where matplotlib is installed; of the blocks that were counted last, then of others."""
    try:
        from fa_ops.sparsity import plots
    except ImportError as error:
        print(f"\nno pictures: {error}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    plots.plot_dropped_shares(model, folder / "dropped-shares.png")
    print(f"\nwrote {folder / 'dropped-shares.png'}")
    if "target" in rules_of(model)["prefill"]:
        plots.plot_calibration(model, folder / "calibration.png")
        print(f"wrote {folder / 'calibration.png'}")
    shares, losses = measure_quality(model, batches, max_new_tokens)
    losses = [loss * unit.per_nat for loss in losses]
    plots.plot_quality(shares, losses, dense.losses[0] * unit.per_nat, folder / "quality.png", unit=unit.name)
    print(f"wrote {folder / 'quality.png'}")


def report_output(tokenizer: Tokenizer, prompt: Tensor, dense: list[int], sparse: list[int]) -> None:
    are_same = [ours == theirs for ours, theirs in zip_longest(sparse, dense)]
    first = (*are_same, False).index(False)
    print(f"\noutput behind {tokenizer.decode(prompt.tolist())[-SHOWN_PROMPT:]!r}")
    print(f"  before  {tokenizer.decode(dense)!r}\n  after   {tokenizer.decode(sparse)!r}")
    print(f"  {sum(are_same)} of {len(are_same)} tokens agree, the first {first} in a row\n")


def report(dense: Behaviour, sparse: Behaviour, unit: Unit, batch_size: int, titles: tuple[str, str]) -> None:
    """The table of losses and times."""
    print(f"{'':<34} {titles[0]:>16} {titles[1]:>16}")
    for phase, *losses in zip(PHASES, dense.losses, sparse.losses, strict=True):
        before, after = (loss * unit.per_nat for loss in losses)
        print(f"{f'{phase} loss, {unit.name}':<34} {before:>16.4f} {after:>16.4f}  {after - before:+.4f}")
    for phase, before, after in zip(PHASES, dense.seconds, sparse.seconds, strict=True):
        name = f"{phase}{' of a token' if phase == 'decode' else ''}, batch of {batch_size}, ms"
        change = f"{after / before:.2f}x slower" if after > before else f"{before / after:.2f}x faster"
        print(f"{name:<34} {before * 1e3:>16.2f} {after * 1e3:>16.2f}  {change}")
    print()


def context_length(model: PreTrainedModel, arguments: argparse.Namespace) -> int:
    """`--seq_len`, cut to what the model has positions for."""
    seq_len = arguments.seq_len
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit < seq_len:
        print(f"--seq_len: {seq_len} wanted, cut to the model's max_position_embeddings of {limit}")
        seq_len = limit
    if seq_len < 2 * arguments.max_new_tokens:
        raise ValueError(
            f"--max_new_tokens: got {arguments.max_new_tokens}, accepted is at most half of --seq_len={seq_len}"
        )
    return seq_len


def block_size(arguments: argparse.Namespace, seq_len: int) -> tuple[int, int]:
    """(br, bc)."""
    library = FlashSkipSoftmaxConfig()
    br, bc = (library.br, library.bc) if seq_len >= LONG_CONTEXT else SHORT_BLOCK
    return arguments.br or br, arguments.bc or bc


def run(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if fa_ops.IS_AVAILABLE and torch.cuda.is_available() else "cpu")
    model = load_model(arguments.pyt_ckpt_path, device)
    vocab_size = model.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(arguments.pyt_ckpt_path, vocab_size)
    is_byte_level = tokenizer.saved is None
    attention = model.config._attn_implementation
    print(
        f"{arguments.pyt_ckpt_path}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} million parameters, "
        f"{str(model.dtype).removeprefix('torch.')} on {device.type}, attention {attention}"
        f"{'; no tokenizer, so byte-level' if is_byte_level else ''}"
    )
    seq_len = context_length(model, arguments)
    br, bc = block_size(arguments, seq_len)
    config = sparse_config(arguments, (br, bc), seq_len)
    is_calibrated = "calibration" in config["sparse_cfg"]
    samples = CalibrationConfig(**config["sparse_cfg"]["calibration"]).samples if is_calibrated else 0
    text = load_text(arguments.text, tokenizer, seq_len, samples)
    print(f"{arguments.sparse_attn}, backend {arguments.backend}, blocks of {br} x {bc} (--br, --bc)")
    print(f"{len(text.held_out)} windows of {seq_len} held-out tokens, the last {arguments.max_new_tokens} decoded")
    batch_size = max(1, min(LARGEST_BATCH, LOGITS_AT_ONCE // (seq_len * vocab_size)))
    batches = list(text.held_out.to(device).split(batch_size))

    dense = observe(model, batches, arguments)
    mtsa.sparsify(model, config, text.calibration if is_calibrated else None)
    sparse = observe(model, batches, arguments)

    prompt = prompt_of(batches, arguments.max_new_tokens)
    report_output(tokenizer, prompt[0], dense.continuation, sparse.continuation)
    unit = Unit("bits per byte", 1 / math.log(2)) if is_byte_level else Unit("nats per token", 1.0)
    titles = (f"dense ({attention})", f"sparse ({arguments.backend})")
    report(dense, sparse, unit, len(batches[0]), titles)
    mtsa.print_sparse_attention_summary(model)
    draw(model, dense, batches, arguments.max_new_tokens, unit, arguments.output)
    if arguments.export_dir is None:
        return 0
    return 0 if export(model, tokenizer, arguments.export_dir, batches[0], arguments.max_new_tokens) else 1


def main(given: list[str] | None = None) -> int:
    try:
        return run(parse_arguments(given))
    except mtsa.CalibrationError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
