"""A compiled Llama of realistic shape with skip-softmax: long prefills, and decoding of many rows behind long texts.

    python examples/benchmarks/models_sparse.py [--quick] [--resume] [--device cpu|cuda] [--output DIR]
                                                [--time-limit SECONDS]

modelopt_triton dense and with half and 70 % of its blocks dropped, against sdpa and flex_attention. The share is made
by a λ, which is searched with the library's own counts, of a model whose scores are structured (structured_model.py).
Writes DIR/models-sparse-<device>.csv and .md. The exit status is 1 when modelopt_triton fails or differs. README.md
beside this says how each figure is measured.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attention_time import attention_milliseconds, marked_attention
from comparing import relative_difference
from model_rows import Agenda, footnote, heading, parse, record, row_key
from models import (
    LLAMA,
    OURS,
    REFERENCE,
    STEPS,
    TINY,
    Decoding,
    Prefill,
    Workload,
    bench_cell,
    clock_of,
    compiled,
    free_memory,
    make_model,
    measure,
    reason,
    reference_logits,
    with_attention,
)
from report import Row
from sparsity import SHARE_TOLERANCE, bisect_threshold
from structured_model import ROPE_THETA, give_structure, structured_ids
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

import fa_ops.sparsity as mtsa

IMPLS = (OURS, REFERENCE, "flex_attention")  # dense
SHARES = (0.5, 0.7)
MODE = "default"  # of torch.compile
SPARSE = f"{OURS}, sparse"
NUM_TEXTS = 8  # that the rows of a cache repeat
ATTENTION_CALLS = 5
COLUMNS = (
    "task", "layout", "length", "batch", "tokens", "cache", "compile", "impl", "br", "bc", "wanted", "threshold",
    "share", "median_ms", "min_ms", "max_ms", "samples", "tokens_per_s", "attention_ms", "attention_min_ms",
    "attention_max_ms", *(f"{what}_over_{impl}" for what in ("speed", "attention") for impl in IMPLS),
    "difference", "difference_from_dense", "unchecked", "peak_gib", "warmup_s", "search_s", "error", "skipped",
    "device", "card", "clocks", "threads", "python", "torch", "triton", "transformers", "cuda", "cudnn", "driver",
    "commit", "date",
)  # fmt: skip


class TextWorkload(Workload):
    """One on structured texts, all of the same length."""

    def documents(self, model: LlamaForCausalLM) -> list[Tensor]:
        generator = torch.Generator(model.device).manual_seed(0)
        return [structured_ids(length, model, generator) for length in self.lengths]

    def columns(self, mode: str, impl: str) -> Row:
        return super().columns(mode, impl) | {"cache": "static" if self.task == "decode" else "none"}

    @property
    def new_tokens(self) -> int:
        """Of a forward."""
        return self.batch if self.task == "decode" else sum(self.lengths)


class TextDecoding(Decoding):
    """Steps that end with `capacity` tokens, over and over: the cache is shared, and what they write is overwritten."""

    def __init__(self, model: LlamaForCausalLM, call: Any, cache: StaticCache, ids: Tensor, capacity: int):
        mask = torch.ones(len(ids), capacity, dtype=torch.long, device=ids.device)
        super().__init__(model, call, cache, ids, mask, capacity)

    def __call__(self) -> Tensor:
        if self.seen == self.mask.shape[1]:
            self.seen -= STEPS
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.seen)
        return super().__call__()


def workloads(quick: bool) -> list[TextWorkload]:
    """The most telling first."""
    sizes = [("prefill", 512, 1), ("decode", 512, 4)]
    if not quick:
        sizes = [("prefill", 32768, 1), ("decode", 16384, 64), ("prefill", 8192, 2)]
    return [TextWorkload(task, "equal", length, batch) for task, length, batch in sizes]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments, __doc__)
    rows = record("models-sparse", options, bench, COLUMNS, add_ratios, markdown)
    return int(any(row["impl"].startswith(OURS) and row.get("error") for row in rows))


def bench(options: argparse.Namespace, done: list[Row]) -> Iterator[Row]:
    agenda = Agenda(options, done)
    block = (16, 16) if options.quick else (64, 128)
    models = make_models(TINY if options.quick else LLAMA, options.device, block)
    with marked_attention(*IMPLS):
        for workload in workloads(options.quick):
            cells: Cells | None = None
            for columns in planned(workload, block):
                row = agenda.settled(columns)
                if row is None:
                    cells = cells or Cells(models, workload)
                    row = columns | cells.measured(columns)
                yield row


def make_models(sizes: dict[str, int], device: str, block: tuple[int, int]) -> dict[str, LlamaForCausalLM]:
    """Of each implementation, and the one to be made sparse under SPARSE; they share their weights."""
    model = make_model(
        sizes, device, initializer_range=sizes["hidden_size"] ** -0.5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )  # fmt: skip
    give_structure(model, torch.Generator(device).manual_seed(0))
    models = {impl: with_attention(model, impl) for impl in IMPLS}
    fields = {"backend": "triton", "br": block[0], "bc": block[1]}
    models[SPARSE] = mtsa.sparsify(with_attention(model, OURS), {"sparse_cfg": {"*": fields}})
    return models


def planned(workload: TextWorkload, block: tuple[int, int]) -> list[Row]:
    """The rows of a workload before anything of it has run, the most telling first."""
    dense = [workload.columns(MODE, impl) for impl in IMPLS]
    sparse = [
        workload.columns(MODE, f"{OURS}, {wanted:.0%} dropped") | {"br": block[0], "bc": block[1], "wanted": wanted}
        for wanted in SHARES
    ]
    return [*dense[:2], *sparse, *dense[2:]]


class Cells:
    """The implementations on one workload. What they share is made once: the cache, and the logits of sdpa."""

    def __init__(self, models: dict[str, LlamaForCausalLM], workload: TextWorkload):
        self.models, self.workload = models, workload
        self.past: tuple[StaticCache, Tensor] | None = None
        self.sparse_call: Any = None
        torch.compiler.reset()
        self.reference = reference_logits(models[REFERENCE], self.prepare)

    def prepare(self, model: LlamaForCausalLM, call: Any) -> Prefill | TextDecoding:
        if self.workload.task == "prefill":
            return Prefill(model, call, self.workload)
        if self.past is None:
            self.past = text_cache(self.models[REFERENCE], self.workload)
        return TextDecoding(model, call, *self.past, self.workload.length)

    def measured(self, columns: Row) -> Row:
        if "wanted" in columns:
            row = self.sparse(columns["wanted"])
        else:
            row = bench_cell(self.models[columns["impl"]], self.prepare, MODE, self.reference, measure_attention)
        if "median_ms" in row:
            row["tokens_per_s"] = 1e3 * self.workload.new_tokens / row["median_ms"]
        return row

    def sparse(self, wanted: float) -> Row:
        """Finds the λ and times it. One compiled model serves every λ."""
        model, row = self.models[SPARSE], Row()
        try:
            if self.sparse_call is None:
                torch.compiler.reset()
                self.sparse_call = compiled(model, MODE)
            free_memory()
            start = time.monotonic()
            row["threshold"], row["share"] = bisect_threshold(self.share_of, wanted)
            row["search_s"] = time.monotonic() - start
            if row["share"] < wanted - SHARE_TOLERANCE:
                return row | {"skipped": f"no λ was found that drops more than {row['share']:.3f}"}
            mtsa.set_thresholds(model, {self.workload.task: [row["threshold"]]})
            with torch.no_grad():
                eager = self.prepare(model, model)().clone()
            if isinstance(self.reference, Tensor):
                row["difference_from_dense"] = relative_difference(eager, self.reference)
            measure_attention(self.prepare(model, self.sparse_call), eager, row, "the same in eager mode")
        except Exception as error:
            row["error"] = reason(error)
        return row

    @torch.no_grad()
    def share_of(self, threshold: float) -> float:
        """That a λ drops in an eager forward, counted by the library."""
        model = self.models[SPARSE]
        mtsa.set_thresholds(model, {self.workload.task: [threshold]})
        with mtsa.collect_stats(model):
            self.prepare(model, model)()
        share = mtsa.dropped_share(model, self.workload.task)
        if share is None:
            raise RuntimeError(f"no block was counted in {self.workload.task}")
        return share


@torch.no_grad()
def text_cache(model: LlamaForCausalLM, workload: TextWorkload) -> tuple[StaticCache, Tensor]:
    """The keys and values that a model has of its texts but for the last STEPS tokens, and the next token (B, 1)."""
    documents = workload.documents(model)[:NUM_TEXTS]
    seen = workload.length - STEPS
    pasts = [DynamicCache(config=model.config) for _ in documents]
    for document, past in zip(documents, pasts, strict=True):
        model(document[None, :seen], past_key_values=past, use_cache=True, logits_to_keep=1)
    repeats = math.ceil(workload.batch / len(documents))
    cache = StaticCache(model.config, workload.length)
    for layer in range(model.config.num_hidden_layers):
        own = [past.layers[layer] for past in pasts]
        key = torch.cat([each.keys for each in own]).repeat(repeats, 1, 1, 1)[: workload.batch]
        value = torch.cat([each.values for each in own]).repeat(repeats, 1, 1, 1)[: workload.batch]
        cache.update(key, value, layer)
    ids = torch.stack([document[seen] for document in documents]).repeat(repeats)[: workload.batch, None]
    return cache, ids


def measure_attention(run: Prefill | Decoding, reference: Tensor | str, row: Row, name: str = REFERENCE) -> None:
    """As `measure`, and the time of attention in further calls."""
    measure(run, reference, row, name)
    with torch.no_grad():
        samples = attention_milliseconds(run, clock_of(run.model), ATTENTION_CALLS)
    row["attention_ms"] = statistics.median(samples)
    row["attention_min_ms"], row["attention_max_ms"] = min(samples), max(samples)


def add_ratios(rows: list[Row]) -> None:
    """Speeds of a row over those of each dense implementation, of all and of attention alone, from medians."""
    by_key = {row_key(row): row for row in rows}
    for row in rows:
        for impl in IMPLS:
            other = by_key.get(row_key(row | {"impl": impl}), {})
            for what, column in (("speed", "median_ms"), ("attention", "attention_ms")):
                if row.get(column) and other.get(column):
                    row[f"{what}_over_{impl}"] = float(other[column]) / float(row[column])


def markdown(rows: list[Row], setting: Row) -> str:
    """A table for each workload, with a row for each implementation, and the reasons of those without figures."""
    lines, reasons = [heading(setting)], list[str]()
    for row in rows:
        if row["impl"] == IMPLS[0]:
            lines += ["", f"{row['task']}, {row['batch']} × {row['length']}, compiled", "", *TABLE_HEAD]
        lines.append(f"| {' | '.join(cells_of(row, reasons))} |")
    lines += ["", "In brackets the speed over dense modelopt_triton, sdpa and flex_attention."]
    return "\n".join(lines + [f"- [{n}] {text}" for n, text in enumerate(reasons, 1)]) + "\n"


TABLE_HEAD = (
    "| | λ | dropped | ms | tokens/s | attention, ms | difference from dense |",
    "|---|--:|--:|--:|--:|--:|--:|",
)


def cells_of(row: Row, reasons: list[str]) -> list[str]:
    def number(column: str, form: str) -> str:
        return format(float(row[column]), form) if row.get(column, "") != "" else ""

    def figure(column: str, what: str) -> str:
        speeds = ", ".join(number(f"{what}_over_{impl}", ".2f") or "–" for impl in IMPLS)
        return f"{number(column, '.4g')} ({speeds})" if row.get(column) else ""

    difference = "difference_from_dense" if row.get("wanted") else "difference"
    return [
        row["impl"],
        number("threshold", ".2g"),
        number("share", ".1%"),
        f"{figure('median_ms', 'speed')} {footnote(row, reasons)}".strip(),
        number("tokens_per_s", ".4g"),
        figure("attention_ms", "attention"),
        number(difference, ".1e"),
    ]


if __name__ == "__main__":
    sys.exit(main())
