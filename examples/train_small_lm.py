"""Train a small byte-level Llama, compiled without a graph break, with attention from `fa_ops`.

It learns the source text of Python's standard library, or your own (--text). A twin with eager attention takes the
first steps beside it. Then it is measured on held-out files, generates text and is saved. The closing table says what
was reached; if a bar is missed, the exit status is 1.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from textdata import (
    BOUNDARY,
    MODEL,
    OUTPUT,
    VOCAB_SIZE,
    by_length,
    cut,
    pad,
    split_held_out,
    stdlib_documents,
    text_documents,
    training_batches,
)
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import fa_ops

ATTENTION = "modelopt_triton"
DEFAULT_MINUTES = 4.0
SEED = 0
CURVE_STEPS = 20
WARM_UP_STEPS = 40
MOST_BITS_PER_BYTE = 2.5
LARGEST_LOSS_DIFFERENCE = 1e-3
LARGEST_LOGIT_DIFFERENCE = 1e-3
MOST_TRAINING_FRAMES = 2  # on a GPU one for float32 and one for bfloat16

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Preset:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    context: int
    batch_size: int
    learning_rate: float


PRESETS = {
    "cpu": Preset(256, 704, 2, 4, 2, context=512, batch_size=2, learning_rate=1e-3),
    "cuda": Preset(512, 1408, 8, 8, 2, context=1024, batch_size=8, learning_rate=1e-3),
}


@dataclass
class History:
    """Of each training step: its loss (nats per byte), its bytes, and the seconds since training began."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def tokens_per_second(self) -> float:
        """Over the steps after the warm-up, or after the first one, which compiles, where training ended before."""
        first = min(WARM_UP_STEPS, (len(self.losses) - 1) // 2)
        return sum(self.tokens[first + 1 :]) / (self.seconds[-1] - self.seconds[first])


@dataclass(frozen=True)
class Row:
    """One line of the closing table, and whether its bar is met."""

    name: str
    value: str
    bar: str = ""
    met: bool = True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE_OR_DIR", help="train on this text instead")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="of training, compilation included (4)")
    length.add_argument("--steps", type=int, help="train for so many steps, whatever the time")
    parser.add_argument("--context", type=int, help="longest piece of text in bytes (512; on a GPU 1024)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="(examples/output)")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes: got {arguments.minutes}, accepted is a positive number")
    if arguments.steps is not None and arguments.steps < 2:
        parser.error(f"--steps: got {arguments.steps}, accepted is 2 or more")
    if arguments.context is not None and arguments.context < 64:
        parser.error(f"--context: got {arguments.context}, accepted is 64 or more")
    return arguments


def build_model(preset: Preset, context: int, attention: str, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_key_value_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=BOUNDARY,
        pad_token_id=BOUNDARY,
        eos_token_id=None,
        attn_implementation=attention,
    )
    config.byte_level = True  # stays in the saved config.json: there is no tokenizer to load
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).to(device)


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def to_device(pieces: list[bytes], device: torch.device) -> Batch:
    """A padded batch; its width is marked dynamic, so that one compiled frame serves every width."""
    batch = pad(pieces, device)
    for tensor in batch.values():
        torch._dynamo.mark_dynamic(tensor, 1)
    return batch


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float, bf16: bool
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up by steps, the same on every machine; then a cosine over `progress`, from 0 to 1."""
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def eager_curve(model: LlamaForCausalLM, batches: Iterable[list[bytes]], preset: Preset, steps: int) -> list[float]:
    """The losses (nats per byte) of the first steps without compilation."""
    optimizer = build_optimizer(model)
    losses = []
    for step, pieces in zip(tqdm(range(steps), desc="eager", **progress_bar()), batches, strict=False):
        rate = learning_rate(preset.learning_rate, step, 0.0)
        losses.append(train_step(model, optimizer, to_device(pieces, model.device), rate, bf16=False))
    return losses


def progress_bar() -> dict[str, float]:
    return {"mininterval": 0.5 if sys.stderr.isatty() else 15.0}


def train(
    model: torch.nn.Module,
    batches: Iterator[list[bytes]],
    preset: Preset,
    minutes: float,
    steps: int | None,
    float32_steps: int = CURVE_STEPS,
) -> History:
    """Train until `minutes` have passed since the call, or for `steps`; the learning rate ends at 0 either way.

    The first steps, which are compared with eager's, are in float32 on every device; then a GPU goes on in bfloat16.
    """
    device = next(model.parameters()).device
    optimizer = build_optimizer(model)
    history = History()
    budget = steps or minutes * 60
    spent, warm, shortest = 0.0, 0.0, math.inf
    start = time.perf_counter()
    with tqdm(total=budget, desc="compiling", bar_format="{desc} |{bar}| {percentage:3.0f}%", **progress_bar()) as bar:
        for step, pieces in enumerate(batches):
            if step <= WARM_UP_STEPS:
                warm = spent
            rate = learning_rate(preset.learning_rate, step, (spent - warm) / max(budget - warm, 1e-9))
            bf16 = device.type == "cuda" and step >= float32_steps
            history.losses.append(train_step(model, optimizer, to_device(pieces, device), rate, bf16))
            history.tokens.append(sum(map(len, pieces)))
            history.seconds.append(time.perf_counter() - start)
            before, spent = spent, step + 1 if steps else history.seconds[-1]
            bar.set_description(f"training, {history.losses[-1] / math.log(2):.2f} bits per byte", refresh=False)
            bar.update(min(spent, budget) - min(before, budget))
            if step:  # the first one compiles, and does not tell what the next will cost
                shortest = min(shortest, spent - before)
                if spent + shortest > budget:
                    break
    return history


def held_out_bits_per_byte(model: torch.nn.Module, pieces: list[bytes], batch_size: int, device: torch.device) -> float:
    """Over every byte of the pieces. With gradients enabled, as in training, so that nothing is compiled anew."""
    nats = 0.0
    for batch in tqdm(by_length(pieces, batch_size), desc="held-out", **progress_bar()):
        nats += model(**to_device(batch, device), use_cache=False).loss.item() * sum(map(len, batch))
    return nats / sum(map(len, pieces)) / math.log(2)


def largest_logit_difference(model: torch.nn.Module, eager: torch.nn.Module, batch: Batch) -> float:
    """At the positions that are no padding."""
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**batch, use_cache=False).logits
    return (model(**batch, use_cache=False).logits.detach() - expected)[valid].abs().max().item()


def explain(model: LlamaForCausalLM, batch: Batch) -> tuple[int, int]:
    """Graph breaks that `torch.compile` would make without `fullgraph`, and attention ops in its graphs."""
    explanation = torch._dynamo.explain(model)(**batch, use_cache=False)
    attention_op = torch.ops.modelopt.varlen_attention
    nodes = [node for graph in explanation.graphs for node in graph.graph.nodes]
    return explanation.graph_break_count, sum(node.target in (attention_op, attention_op.default) for node in nodes)


def generate(model: LlamaForCausalLM, text: bytes, context: int) -> tuple[bytes, bytes]:
    """(prompt, continuation): the beginning of `text`, continued with a static cache and a compiled decoding step."""
    prompt = text[: context // 4]
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # on a CPU, Transformers would not compile
    input_ids = torch.tensor([[BOUNDARY, *prompt]], device=model.device)
    torch.manual_seed(SEED)
    tokens = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=context // 2,
        do_sample=True,
        temperature=0.7,
        cache_implementation="static",
        compile_config=compile_config,
    )[0, input_ids.shape[1] :].tolist()
    return prompt, bytes(token for token in tokens if token < 256)


def plot(history: History, eager_losses: list[float], held_out: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    whole, first = figure.subplots(1, 2)
    ours = [loss / math.log(2) for loss in history.losses]
    theirs = [loss / math.log(2) for loss in eager_losses]
    whole.plot(range(1, len(ours) + 1), ours, linewidth=0.6, label=f"{ATTENTION}, compiled")
    whole.axhline(held_out, color="black", linestyle=":", label=f"held-out files: {held_out:.2f}")
    whole.set(title="training", xlabel="step", ylabel="bits per byte")
    steps = range(1, min(len(ours), len(theirs)) + 1)
    first.plot(steps, ours[: len(steps)], linewidth=3, alpha=0.5, label=f"{ATTENTION}, compiled")
    first.plot(steps, theirs[: len(steps)], "k--", linewidth=1, label="eager")
    first.set(title="the first steps beside eager", xlabel="step")
    first.xaxis.get_major_locator().set_params(integer=True)
    for axes in (whole, first):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def at_most(name: str, value: float, limit: float, form: str) -> Row:
    return Row(name, format(value, form), f"≤ {limit:g}" if limit < math.inf else "", value <= limit)


def exactly(name: str, value: int, expected: int) -> Row:
    return Row(name, str(value), f"= {expected}", value == expected)


def report(rows: list[Row]) -> int:
    """Prints the table, and returns the exit status."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = "" if not row.bar else "ok" if row.met else "MISSED"
        print(f"{row.name:<{width}}  {row.value:>10}  {row.bar:<8} {verdict}".rstrip())
    missed = [row.name for row in rows if not row.met]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed else 0


def largest_loss_difference(ours: list[float], eager: list[float]) -> float:
    """Over the steps that both took; NaN if any loss is."""
    steps = min(len(ours), len(eager))
    return (torch.tensor(ours[:steps]) - torch.tensor(eager[:steps])).abs().max().item()


def load_text(source: Path | None, context: int) -> tuple[list[bytes], list[bytes], bytes]:
    """Pieces to train on, held-out pieces (shortest first), and a whole held-out document."""
    training, held_out = split_held_out(text_documents(source) if source else stdlib_documents())
    pieces, held_out_pieces = ([p for _, text in part for p in cut(text, context - 1)] for part in (training, held_out))
    print(
        f"{len(training)} documents to train on ({sum(map(len, pieces)) / 1e6:.2f} MB), "
        f"{len(held_out)} held out ({sum(map(len, held_out_pieces)) / 1e6:.2f} MB)"
    )
    return pieces, sorted(held_out_pieces, key=len), held_out[0][1]


def run(arguments: argparse.Namespace) -> list[Row]:
    device = torch.device("cuda" if fa_ops.IS_AVAILABLE and torch.cuda.is_available() else "cpu")
    preset = PRESETS[device.type]
    context = arguments.context or preset.context
    pieces, held_out, document = load_text(arguments.text, context)
    model, eager = (build_model(preset, context, attention, device) for attention in (ATTENTION, "eager"))
    print(f"{model.num_parameters() / 1e6:.2f} million parameters, context {context}, on {device.type}")

    def batches() -> Iterator[list[bytes]]:
        return training_batches(pieces, preset.batch_size, SEED)

    graph_breaks, attention_ops = explain(model, to_device(next(batches()), device))
    counters.clear()
    eager_losses = eager_curve(eager, batches(), preset, min(CURVE_STEPS, arguments.steps or CURVE_STEPS))
    compiled = torch.compile(model, fullgraph=True)
    history = train(compiled, batches(), preset, arguments.minutes, arguments.steps)
    bits_per_byte = held_out_bits_per_byte(compiled, held_out, preset.batch_size, device)
    eager.load_state_dict(model.state_dict())
    mixed = held_out[:: max(1, len(held_out) // preset.batch_size)][: preset.batch_size]
    mixed_batch = to_device(by_length(mixed, preset.batch_size)[0], device)
    logit_difference = largest_logit_difference(compiled, eager, mixed_batch)
    training_frames = counters["stats"]["unique_graphs"]
    prompt, continuation = generate(model.eval(), document, context)
    decoding_frames = counters["stats"]["unique_graphs"] - training_frames
    graph_breaks += sum(counters["graph_break"].values())
    print(f"\n{(prompt + continuation).decode(errors='replace')}\n")

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output / MODEL)
    print(f"wrote {arguments.output / MODEL} (byte-level: no tokenizer, token i is byte i, {BOUNDARY} begins a text)")
    try:
        plot(history, eager_losses, bits_per_byte, arguments.output / "loss.png")
        print(f"wrote {arguments.output / 'loss.png'}\n")
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib\n")
    curve_steps = min(len(history.losses), len(eager_losses))
    loss_difference = largest_loss_difference(history.losses, eager_losses)
    is_default = not arguments.text and not arguments.steps and arguments.minutes >= DEFAULT_MINUTES
    most_bits = MOST_BITS_PER_BYTE if is_default else math.inf
    return [
        at_most("held-out loss, bits per byte", bits_per_byte, most_bits, ".3f"),
        Row("training time, seconds", f"{history.seconds[-1]:.0f}"),
        Row("training speed, tokens per second", f"{history.tokens_per_second():,.0f}"),
        exactly("graph breaks", graph_breaks, 0),
        exactly("attention ops in the graph", attention_ops, preset.num_hidden_layers),
        at_most("compiled frames, training", training_frames, MOST_TRAINING_FRAMES, "d"),
        exactly("compiled frames, decoding", decoding_frames, 1),
        at_most("largest logit difference from eager", logit_difference, LARGEST_LOGIT_DIFFERENCE, ".1e"),
        at_most(f"largest loss difference, {curve_steps} steps", loss_difference, LARGEST_LOSS_DIFFERENCE, ".1e"),
    ]


if __name__ == "__main__":
    options = parse_arguments()
    fa_ops.register_triton_attention()
    sys.exit(report(run(options)))
