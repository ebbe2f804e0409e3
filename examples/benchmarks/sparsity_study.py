"""What skip-softmax costs in quality: loss over the share of blocks dropped, on held-out text.

    PYTHONPATH=. python examples/benchmarks/sparsity_study.py [--checkpoint DIR] [--text FILE_OR_DIR] [--name NAME]
    PYTHONPATH=. python examples/benchmarks/sparsity_study.py --train --minutes 10        # a larger model; needs CUDA

For each visiting order, block size, phase and wanted share: the loss in bits per byte with one λ for the whole model,
and with λ given to layers and heads in other ways. λ is found on training text, from a dense pass; shares and losses
are those of held-out text. Intervals are bootstraps over the held-out windows.

Writes NAME.csv after each row, then NAME.png and NAME.md from it. Rows come in the order of their importance, and those
that the time limit cuts off say so. README.md beside this says how each figure is measured.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import study_allocation
import torch
from environment import describe, version
from report import Row, cut_off, write_csv
from study_attention import ATTENTION, PHASES, Setting, register
from study_loss import Bootstrap, Losses, Windows, bits_per_byte, count_margins, cut_windows, evaluate
from study_report import write_report
from study_train import PRESET, documents, train
from textdata import split_held_out
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fa_ops.sparsity as mtsa
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS

SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)
THRESHOLDS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7)
ALLOCATIONS = ("equal_share", "equal_attention", "loss_by_layer", "loss_by_head")
DEFAULTS = {
    "cpu": {
        "blocks": ["16x16", "64x64", "32x32", "16x32", "32x16", "64x128"],
        "allocations": ALLOCATIONS, "windows": 32, "calibration_windows": 16, "depth": 7,
    },
    "cuda": {  # for the larger model, whose losses by head would take longer than all the rest
        "blocks": ["64x128", "16x16", "128x128", "64x64", "32x32"],
        "allocations": ALLOCATIONS[:-1], "windows": 16, "calibration_windows": 8, "depth": 5,
    },
}  # fmt: skip
LEFT_OUT = 8  # priority of what is never measured
OP_THRESHOLD, OP_STEPS, OP_BLOCKS = 0.2, 64, 4  # of the check against the op
SENSITIVITY_BYTES = 1 << 15  # of text that a loss for each layer or head is measured on
COLUMNS = (
    "order", "phase", "br", "bc", "allocation", "wanted", "threshold", "share", "bits_per_byte",
    "added", "added_low", "added_high", "base", "versus_base", "versus_low", "versus_high", "largest_share", "skipped",
    "model", "training", "parameters", "layers", "heads", "context", "windows", "bytes", "calibration_windows",
    "device", "card", "clocks", "threads", "python", "torch", "triton", "transformers", "cuda", "cudnn", "driver",
    "commit", "date",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.train:
        bits = train(options.text, options.checkpoint, PRESET, options.minutes, None)
        print(f"trained to {bits:.3f} bits per byte: {options.checkpoint}", file=sys.stderr)
    study = Study(options)
    environment = describe(options.device) | {"transformers": version("transformers")}
    path = options.output / options.name
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        for row in study.rows():
            rows.append(environment | study.about | row)
            write_csv(rows, path.with_suffix(".csv"), COLUMNS)
    finally:
        if rows:  # also of a study that failed midway
            write_report(path.with_suffix(".csv"))
    print(path.with_suffix(".md").read_text())
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, default=here.parent / "output" / "model", help="a causal model that "
                        "Transformers loads, the demo's if not given")  # fmt: skip
    parser.add_argument("--label", help="the model's name in the report (its architecture)")
    parser.add_argument("--text", type=Path, metavar="FILE_OR_DIR", help="the text, of which a fixed part is held out "
                        "(the sources of the standard library)")  # fmt: skip
    parser.add_argument("--train", action="store_true", help="first train a larger model, into --checkpoint, on --text "
                        "or all Python sources that are installed")  # fmt: skip
    parser.add_argument("--installed", action="store_true", help="the text is all Python sources that are installed, "
                        "as with --train")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0, help="of that training (10)")
    parser.add_argument("--context", type=int, help="tokens of a window (as many as the model allows)")
    parser.add_argument("--windows", type=int, help="of held-out text (32; with CUDA 16)")
    parser.add_argument("--calibration-windows", type=int, help="of training text (16; with CUDA 8)")
    parser.add_argument("--orders", nargs="+", choices=VISIT_ORDERS, default=VISIT_ORDERS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--blocks", nargs="+", help="such as 16x16, the most important first")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of blocks to drop")
    parser.add_argument("--thresholds", nargs="*", type=float, default=THRESHOLDS, help="λ to measure as they are")
    parser.add_argument("--allocations", nargs="*", choices=ALLOCATIONS, help="besides one λ for the whole model")
    parser.add_argument("--depth", type=int, help="the last priority of the plan that is measured, see `priority` (7, "
                        "that is all; with CUDA 5)")  # fmt: skip
    parser.add_argument("--time-limit", type=float, default=840, help="seconds after which no further row is begun")
    parser.add_argument("--name", default="sparsity-study", help="of the files")
    parser.add_argument("--output", type=Path, default=here / "results", help="folder to write to")
    options = parser.parse_args(arguments)
    if options.train and options.device != "cuda":
        parser.error("--train: given on a CPU; it needs CUDA (examples/train_small_lm.py trains on a CPU)")
    if not options.train and not options.checkpoint.exists():
        parser.error(f"--checkpoint: {options.checkpoint} does not exist; examples/train_small_lm.py writes the demo's")
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.blocks = [(int(br), int(bc)) for br, bc in (block.split("x") for block in options.blocks)]
    return options


def load_model(checkpoint: Path, device: str) -> PreTrainedModel:
    register()
    dtype = torch.float32
    if device == "cuda":
        dtype = torch.bfloat16
        torch.set_float32_matmul_precision("high")  # TF32, which holds every bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=ATTENTION, dtype=dtype)
    return model.to(device).eval()


class Study:
    """A model, its windows, what dense passes counted, and the curves measured so far, by setting and allocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = load_model(options.checkpoint, options.device)
        config = self.model.config
        is_byte_level = getattr(config, "byte_level", False)
        tokenizer = None if is_byte_level else AutoTokenizer.from_pretrained(options.checkpoint)
        context = options.context or config.max_position_embeddings
        texts = split_held_out(documents(options.text, with_installed=options.train or options.installed))
        counts = (options.calibration_windows, options.windows)
        self.calibration, self.held_out = (
            cut_windows(text, context, count, tokenizer) for text, count in zip(texts, counts, strict=True)
        )
        self.bootstrap = Bootstrap(self.held_out)
        self.shape = config.num_hidden_layers, config.num_attention_heads
        self.margins: dict[Setting, Tensor] = {}
        self.curves: dict[Setting, list[Losses]] = {}
        self.about: Row = {
            "model": f"{options.label or config.model_type}, {'byte-level' if is_byte_level else 'with a tokenizer'}",
            "training": getattr(config, "study_training", ""),
            "parameters": self.model.num_parameters(), "layers": self.shape[0], "heads": self.shape[1],
            "context": context, "windows": options.windows, "bytes": int(self.held_out.bytes.sum()),
            "calibration_windows": options.calibration_windows,
        }  # fmt: skip

    def rows(self) -> Iterator[Row]:
        self.deadline = time.monotonic() + self.options.time_limit
        plan = self.plan()
        settings = list(dict.fromkeys(setting for setting, _ in plan))
        self.margins = count_margins(self.model, self.calibration, settings)
        self.dense = evaluate(self.model, self.held_out, settings[0], self.everywhere(-math.inf))
        yield {"allocation": "dense", "share": 0.0, "bits_per_byte": bits_per_byte(self.dense, self.held_out)}
        self.curves = {setting: [self.dense] for setting in settings}
        for setting in settings:
            yield from self.counted(setting)
        for setting, name in plan:
            columns: Row = {**setting._asdict(), "allocation": name}
            if self.is_late():
                yield columns | self.late
                continue
            print(*columns.values(), file=sys.stderr, flush=True)
            for row in self.fixed(setting) if name == "fixed" else self.allocated(setting, name):
                yield columns | row
        for phase in self.options.phases:
            yield from self.through_the_op(next(setting for setting in settings if setting.phase == phase))

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def late(self) -> Row:
        return cut_off(self.options.time_limit)

    def plan(self) -> list[tuple[Setting, str]]:
        """Settings and allocations to measure, the most telling first."""
        orders = sorted(self.options.orders, key=lambda order: order != VISIT_ORDER)
        blocks = {
            "prefill": self.options.blocks,
            "decode": list(dict.fromkeys((1, bc) for _, bc in self.options.blocks)),
        }
        entries = [
            (priority(name, order == orders[0], block == blocks[phase][0]), Setting(order, phase, *block), name)
            for name in ("uniform", "fixed", *self.options.allocations)
            for phase in self.options.phases
            for order in orders
            for block in blocks[phase]
        ]
        entries.sort(key=lambda entry: entry[0])
        return [(setting, name) for place, setting, name in entries if place <= self.options.depth]

    def everywhere(self, ln_threshold: float) -> Tensor:
        return torch.full(self.shape, ln_threshold)

    def counted(self, setting: Setting) -> Iterator[Row]:
        """What λ would drop of dense attention on the training text, as a calibration counts it."""
        reach = study_allocation.Reach.of(self.margins[setting])
        columns: Row = {**setting._asdict(), "allocation": "counted", "largest_share": reach.largest}
        for threshold in self.options.thresholds:
            yield columns | {"threshold": threshold, "share": reach.share(math.log(threshold))}

    def fixed(self, setting: Setting) -> Iterator[Row]:
        """λ as given."""
        for threshold in self.options.thresholds:
            if self.is_late():
                yield {"threshold": threshold} | self.late
                continue
            losses = evaluate(self.model, self.held_out, setting, self.everywhere(math.log(threshold)))
            yield {"threshold": threshold} | self.figures(losses)

    def allocated(self, setting: Setting, name: str) -> Iterator[Row]:
        """One row for each wanted share."""
        counts = self.margins[setting]
        largest = study_allocation.Reach.of(counts).largest
        try:
            groups, shares_of = self.allocation(setting, name)
        except TimeoutError:
            yield self.late
            return
        is_uniform = name == "uniform"
        base = setting._replace(order=VISIT_ORDER) if is_uniform else setting
        for wanted in self.options.shares:
            row: Row = {"wanted": wanted, "largest_share": largest}
            if wanted > largest:
                yield row | {"skipped": f"no λ below 1 drops more than {largest:.3f}"}
                continue
            if self.is_late():
                yield row | self.late
                continue
            ln_threshold = study_allocation.ln_thresholds(counts, groups, shares_of(wanted))
            losses = evaluate(self.model, self.held_out, setting, ln_threshold)
            if is_uniform:
                self.curves[setting].append(losses)
                row["threshold"] = math.exp(ln_threshold[0, 0])
            row |= self.figures(losses)
            if not is_uniform or base != setting:
                row |= self.versus(losses, base, base.order if is_uniform else "uniform")
            yield row

    def allocation(self, setting: Setting, name: str):
        """The groups of heads that share a λ, and a function from a wanted share to that of each group."""
        counts = self.margins[setting]
        if name == "uniform":
            return study_allocation.one_group(counts), lambda wanted: [wanted]
        groups = (study_allocation.by_layer if name == "loss_by_layer" else study_allocation.by_head)(counts)
        if name == "equal_share":
            return groups, lambda wanted: study_allocation.equal_shares(counts, groups, wanted)

        step = -(-int(self.calibration.bytes.sum()) // SENSITIVITY_BYTES)
        windows = Windows(self.calibration.ids[::step], self.calibration.bytes[::step])

        def loss(ln_threshold: Tensor) -> float:
            if self.is_late():
                raise TimeoutError
            return bits_per_byte(evaluate(self.model, windows, setting, ln_threshold), windows)

        if name == "equal_attention":
            sensitivities = study_allocation.attention_sensitivities(counts, groups)
        else:
            sensitivities = study_allocation.loss_sensitivities(counts, groups, loss)
        return groups, lambda wanted: study_allocation.cheapest_shares(sensitivities, wanted)

    def figures(self, losses: Losses) -> Row:
        added = self.bootstrap.added(losses, self.dense)
        return {
            "share": losses.share, "bits_per_byte": bits_per_byte(losses, self.held_out),
            **dict(zip(("added", "added_low", "added_high"), added, strict=True)),
        }  # fmt: skip

    def versus(self, losses: Losses, base: Setting, name: str) -> Row:
        curve = self.curves.get(base, [])
        difference = self.bootstrap.against(losses, curve) if len(curve) > 1 else None
        if difference is None:
            return {}
        return {"base": name, **dict(zip(("versus_base", "versus_low", "versus_high"), difference, strict=True))}

    def through_the_op(self, setting: Setting) -> Iterator[Row]:
        """The first window (of decoding its first steps) through the study's attention and through the op that a user
        calls, in the order that the op knows: shares and losses have to be the same but for rounding."""
        setting = setting._replace(order=VISIT_ORDER)
        length = self.held_out.ids.shape[1]
        if setting.phase == "decode":
            length = min(length, max(OP_STEPS, OP_BLOCKS * setting.bc))
        window = Windows(self.held_out.ids[:1, :length], self.held_out.bytes[:1])
        ours = evaluate(self.model, window, setting, self.everywhere(math.log(OP_THRESHOLD)))
        fields = {
            "thresholds": {setting.phase: [OP_THRESHOLD]}, "br": max(setting.br, 16), "bc": setting.bc,
            "backend": "triton", "collect_stats": True,
        }  # fmt: skip
        mtsa.sparsify(self.model, {"sparse_cfg": {"*": fields}})
        try:
            logits = op_logits(self.model, window.ids.to(self.model.device), setting.phase)
            share = mtsa.dropped_share(self.model, setting.phase)
        finally:
            mtsa.remove_sparse_attention(self.model)
        nats = torch.nn.functional.cross_entropy(logits[:-1].float(), window.ids[0, 1:].to(logits.device)).item()
        columns: Row = {**setting._asdict(), "threshold": OP_THRESHOLD}
        bits = nats / math.log(2)
        yield columns | {"allocation": "op", "share": share, "bits_per_byte": bits}
        bits = ours.nats[0] / (length - 1) / math.log(2)
        yield columns | {"allocation": "study", "share": ours.share, "bits_per_byte": bits}


def priority(name: str, is_first_order: bool, is_first_block: bool) -> int:
    """Where an allocation comes in the plan: all orders with one λ, then all allocations of the first order, both with
    the first block size; then the other block sizes, and λ as given."""
    if name == "uniform":
        return 0 if is_first_block else 3 if is_first_order else 6
    if name == "fixed":
        return 4 if is_first_order and is_first_block else 5 if is_first_order or is_first_block else LEFT_OUT
    if not is_first_block:
        return LEFT_OUT
    is_measured = name.startswith("loss")  # for each group, which takes its time
    return 7 if not is_first_order else 2 if is_measured else 1


@torch.no_grad()
def op_logits(model: PreTrainedModel, ids: Tensor, phase: str) -> Tensor:
    """(S, vocabulary) of one window, in one prefill or by one decoding step after another."""
    if phase == "prefill":
        return model(input_ids=ids, use_cache=False).logits[0]
    cache, logits = None, []
    for token in ids.split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0])
    return torch.cat(logits)


if __name__ == "__main__":
    sys.exit(main())
