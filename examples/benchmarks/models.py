"""Prefill and decoding of a Llama of realistic shape: modelopt_triton against sdpa and flex_attention.

    python examples/benchmarks/models.py [--quick] [--resume] [--device cpu|cuda] [--output DIR] [--time-limit SECONDS]

Before a cell is timed, its logits are compared with those of sdpa. What fails, or runs out of memory or time, is a row
with its reason. Writes DIR/models-<device>.csv and DIR/models-<device>.md. The exit status is 1 when modelopt_triton
fails or differs. README.md beside this says how each figure is measured.
"""

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from comparing import error_text, relative_difference
from model_rows import Agenda, footnote, heading, parse, record, row_key
from report import Row
from timing import Clock, CpuClock, CudaClock, interleave, summary
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import fa_ops

OURS, REFERENCE = "modelopt_triton", "sdpa"
IMPLS = (OURS, REFERENCE, "flex_attention")
MODES = ("eager", "default", "reduce-overhead")  # the last two of torch.compile
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
# rows of a prefill of the longest sequence; the order is that of the cells
PREFILL_BATCH = {8192: 4, 32768: 2, 2048: 16}
TINY_BATCH = {48: 2}
DECODE_BATCH = 8
STEPS = 8  # decoding steps of one sample
MAX_ROUNDS, SECONDS_PER_CELL = 8, 3.0
# Relative, in the Euclidean norm. Rounding to bfloat16 makes up to 0.05, a lost mask 0.5 and more.
TOLERANCE = 0.2
COLUMNS = (
    "task", "layout", "length", "batch", "tokens", "cache", "compile", "impl",
    "median_ms", "min_ms", "max_ms", "samples", "ours_over_impl", "difference", "unchecked", "peak_gib", "warmup_s",
    "error", "skipped",
    "device", "card", "clocks", "threads", "python", "torch", "triton", "transformers", "cuda", "cudnn", "driver",
    "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A prefill of `batch` sequences of equal lengths; or of different ones, the first of which is `length` and the
    others at least half of it, padded on the left or packed into one row; or one decoding step behind as many cached
    tokens."""

    task: str  # "prefill" or "decode"
    layout: str  # "equal", "padded" or "packed"
    length: int
    batch: int

    @property
    def lengths(self) -> list[int]:
        if self.layout == "equal":
            return [self.length] * self.batch
        return [self.length - row * self.length // (2 * self.batch) for row in range(self.batch)]

    def documents(self, model: PreTrainedModel) -> list[Tensor]:
        """Token ids of each sequence."""
        generator = torch.Generator(model.device).manual_seed(0)
        return [
            torch.randint(model.config.vocab_size, (length,), generator=generator, device=model.device)
            for length in self.lengths
        ]

    def columns(self, mode: str, impl: str) -> Row:
        cache = {"prefill": "none", "decode": "dynamic" if mode == "eager" else "static"}[self.task]
        return {
            "task": self.task, "layout": self.layout, "length": self.length, "batch": self.batch,
            "tokens": sum(self.lengths), "cache": cache, "compile": mode, "impl": impl,
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments, __doc__)
    rows = record("models", options, bench, COLUMNS, add_ratios, markdown)
    return int(any(row["impl"] == OURS and row.get("error") for row in rows))


def cells(quick: bool) -> list[tuple[str, Workload]]:
    """(mode, workload), the most telling first."""
    batches, decode_batch = (TINY_BATCH, 2) if quick else (PREFILL_BATCH, DECODE_BATCH)
    prefills = [Workload("prefill", layout, *size) for size in batches.items() for layout in ("padded", "packed")]
    decodings = [Workload("decode", "padded", length, decode_batch) for length in batches]
    return [
        *[("eager", workload) for workload in (*prefills, *decodings)],
        *[(mode, workload) for mode in ("default", "reduce-overhead") for workload in decodings],
        *[("default", workload) for workload in prefills],
    ]


def bench(options: argparse.Namespace, done: list[Row]) -> Iterator[Row]:
    agenda = Agenda(options, done)
    models = make_models(TINY if options.quick else LLAMA, options.device)
    references: dict[Workload, Tensor | str] = {}
    for mode, workload in cells(options.quick):
        for impl in IMPLS:
            columns = workload.columns(mode, impl)
            row = agenda.settled(columns)
            if row is None:
                prepare = partial(TASKS[workload.task], workload=workload)
                if workload not in references:
                    references[workload] = reference_logits(models[REFERENCE], prepare)
                row = columns | bench_cell(models[impl], prepare, mode, references[workload], measure)
            yield row


def make_models(sizes: dict[str, int], device: str) -> dict[str, PreTrainedModel]:
    """One model for each implementation; they share their weights, which are random."""
    spread = 1.75 * sizes["hidden_size"] ** -0.5  # scores of deviation 3: attention tells keys apart
    model = make_model(sizes, device, initializer_range=spread)
    return {impl: with_attention(model, impl) for impl in IMPLS}


def make_model(sizes: dict[str, int], device: str, **fields: Any) -> LlamaForCausalLM:
    """bfloat16, of random weights; `fields` are further ones of its configuration."""
    config = LlamaConfig(**sizes, max_position_embeddings=2 * max(PREFILL_BATCH), **fields)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def with_attention(model: LlamaForCausalLM, impl: str) -> LlamaForCausalLM:
    """A model that shares the weights and has the attention implementation."""
    fa_ops.register_triton_attention()
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    made.set_attn_implementation(impl)
    return made


class Prefill:
    """Calls of a model on all tokens at once; returns the logits that follow each sequence's last token."""

    calls = 1  # of a sample

    def __init__(self, model: PreTrainedModel, call: Callable, workload: Workload):
        self.model, self.call = model, call
        self.arguments = ARGUMENTS[workload.layout](workload, model)

    def __call__(self) -> Tensor:
        return self.call(**self.arguments, use_cache=False).logits.flatten(0, 1)


class Decoding:
    """One decoding step after another, as in `generate`, making of its inputs and of the mask included.

    `ids` (B, 1) are the tokens of every step, `mask` (B, capacity) is 0 for padding; `seen` tokens are in the cache.
    """

    calls = STEPS

    def __init__(self, model: PreTrainedModel, call: Callable, cache: Cache, ids: Tensor, mask: Tensor, seen: int):
        self.model, self.call = model, call
        self.cache, self.ids, self.mask, self.seen = cache, ids, mask, seen

    def __call__(self) -> Tensor:
        self.seen += 1
        mask = self.mask[:, : self.seen]
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            past_key_values=self.cache,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            use_cache=True,
        )
        torch.compiler.cudagraph_mark_step_begin()
        return self.call(**inputs).logits[:, -1]


def random_past(model: PreTrainedModel, call: Callable, workload: Workload) -> Decoding:
    """Decoding behind random keys and values: in a growing cache in eager mode, a static one compiled."""
    capacity = workload.length + STEPS * (MAX_ROUNDS + 3)
    cache = DynamicCache(config=model.config) if call is model else StaticCache(model.config, capacity)
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (workload.batch, model.config.num_key_value_heads, workload.length, model.config.head_dim)
    for layer in range(model.config.num_hidden_layers):
        key, value = (torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    pads = workload.length - torch.tensor(workload.lengths, device=model.device)
    mask = (torch.arange(capacity, device=model.device) >= pads[:, None]).long()
    ids = torch.randint(model.config.vocab_size, (workload.batch, 1), generator=generator, device=model.device)
    return Decoding(model, call, cache, ids, mask, workload.length)


Prepare = Callable[[PreTrainedModel, Callable], Prefill | Decoding]  # of a model, and of what is called in its place
TASKS: dict[str, Callable[..., Prefill | Decoding]] = {"prefill": Prefill, "decode": random_past}


def equal(workload: Workload, model: PreTrainedModel) -> Row:
    """A model's arguments for documents of the same length, without a mask."""
    return {"input_ids": torch.stack(workload.documents(model)), "logits_to_keep": 1}


def padded(workload: Workload, model: PreTrainedModel) -> Row:
    """A model's arguments for documents in rows of their own, padded on the left."""
    ids = torch.zeros(workload.batch, workload.length, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(workload.documents(model)):
        ids[row, -len(document) :], mask[row, -len(document) :] = document, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}


def packed(workload: Workload, model: PreTrainedModel) -> Row:
    """A model's arguments for all documents in one row, told apart by their positions."""
    positions = [torch.arange(length, device=model.device) for length in workload.lengths]
    ends = torch.tensor(workload.lengths, device=model.device).cumsum(0)
    return {
        "input_ids": torch.cat(workload.documents(model))[None],
        "position_ids": torch.cat(positions)[None],
        "logits_to_keep": ends - 1,
    }


ARGUMENTS = {"equal": equal, "padded": padded, "packed": packed}


@torch.no_grad()
def reference_logits(model: PreTrainedModel, prepare: Prepare) -> Tensor | str:
    """What sdpa gives in eager mode, or why it does not."""
    try:
        free_memory()
        return prepare(model, model)().clone()
    except Exception as error:
        return f"{REFERENCE}: {reason(error)}"


def bench_cell(
    model: PreTrainedModel,
    prepare: Prepare,
    mode: str,
    reference: Tensor | str,
    measure: Callable[[Prefill | Decoding, Tensor | str, Row], None],
) -> Row:
    row: Row = {}
    try:
        torch.compiler.reset()
        free_memory()
        measure(prepare(model, compiled(model, mode)), reference, row)
    except Exception as error:
        row["error"] = reason(error)
    return row


def compiled(model: PreTrainedModel, mode: str) -> Callable:
    return model if mode == "eager" else torch.compile(model, mode=mode)


def measure(run: Prefill | Decoding, reference: Tensor | str, row: Row, name: str = REFERENCE) -> None:
    """Compares the logits with those of the reference, whose name it is, then times; adds to the row."""
    on_cuda = run.model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    row |= compared(run, reference, name)
    row |= timed(run, clock_of(run.model))
    if on_cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


@torch.no_grad()
def compared(run: Prefill | Decoding, reference: Tensor | str, name: str) -> Row:
    """The first call, which compiles, and the difference of its logits from the reference's."""
    start = time.monotonic()
    logits = run().clone()
    finite = bool(logits.isfinite().all())  # waits for the device
    row: Row = {"warmup_s": time.monotonic() - start}
    if isinstance(reference, str):
        return row | {"unchecked": reference}
    row["difference"] = relative_difference(logits, reference)
    if not finite or row["difference"] > TOLERANCE:
        row["error"] = f"differs from {name} by {row['difference']:.1e}, more than {TOLERANCE:g}"
    return row


def timed(run: Prefill | Decoding, clock: Clock) -> Row:
    def sample() -> None:
        for _ in range(run.calls):
            run()

    samples = interleave({"": SimpleNamespace(forward=sample)}, "forward", clock, MAX_ROUNDS, SECONDS_PER_CELL)[""]
    return summary([milliseconds / run.calls for milliseconds in samples])


def clock_of(model: PreTrainedModel) -> Clock:
    return SynchronisedClock() if model.device.type == "cuda" else CpuClock()


class SynchronisedClock(CudaClock):
    """Without the head start: where the device waits for Python, so does whoever generates."""

    def begin_round(self) -> None:
        torch.cuda.synchronize()


def reason(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else error_text(error)


def free_memory() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def add_ratios(rows: list[Row]) -> None:
    """ours_over_impl: the speed of modelopt_triton over that of the row's implementation, from medians."""
    medians = {row_key(row): float(row["median_ms"]) for row in rows if row.get("median_ms")}
    for row in rows:
        ours = medians.get(row_key(row | {"impl": OURS}))
        if ours and row_key(row) in medians:
            row["ours_over_impl"] = medians[row_key(row)] / ours


def markdown(rows: list[Row], setting: Row) -> str:
    """Milliseconds of each implementation in a row for each workload, and the reasons of those that have none."""
    lines = [
        heading(setting),
        "",
        f"| | compiled | {' | '.join(IMPLS)} |",
        f"|---|---|{'--:|' * len(IMPLS)}",
    ]
    by_key, reasons = {row_key(row): row for row in rows}, list[str]()
    for row in rows:
        if row["impl"] == OURS:
            figures = [figure(by_key[row_key(row | {"impl": impl})], reasons) for impl in IMPLS]
            name = f"{row['task']}, {row['layout']}, {row['batch']} × ≤ {row['length']}"
            lines.append(f"| {name} | {row['compile']} | {' | '.join(figures)} |")
    lines += ["", "Milliseconds of a prefill or of a decoding step; in brackets the speed of modelopt_triton over it."]
    return "\n".join(lines + [f"- [{n}] {text}" for n, text in enumerate(reasons, 1)]) + "\n"


def figure(row: Row, reasons: list[str]) -> str:
    text = ""
    if row.get("median_ms"):
        text = f"{float(row['median_ms']):.4g}"
        if row["impl"] != OURS and row.get("ours_over_impl"):
            text += f" ({float(row['ours_over_impl']):.2f})"
    return f"{text} {footnote(row, reasons)}".strip()


if __name__ == "__main__":
    sys.exit(main())
