"""Attention's part of a Transformers prefill: a small Llama through `modelopt_triton` and through `sdpa`.

The model is that of models.py with two layers. Clocks are read before and after each call of the attention function
that Transformers calls by name; the sum over the layers is the time of attention, without the making of the mask, which
a model does once.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comparing import error_text, relative_difference
from report import Row
from timing import Clock, Run, interleave, summary

LAYOUTS = ("equal", "padded", "packed")  # sequences: of equal lengths without a mask; of different ones
NAMES = {"fa_ops": "modelopt_triton", "sdpa": "sdpa"}  # Transformers' of each implementation
BATCH, LENGTH, LAYERS = 4, 8192, 2
ROUNDS, SECONDS = 8, 3.0
DIRECTIONS = ("prefill", "prefill_attention")


def planned(layout: str, batch: int = BATCH, length: int = LENGTH) -> list[Row]:
    columns = {
        "case": f"Llama, {batch} x {'' if layout == 'equal' else '<= '}{length}, {layout}",
        "dtype": "bfloat16",
        "num_heads_q": 32,
        "num_heads_kv": 8,
        "head_dim": 128,
        "batch": batch,
        "lengths": f"{batch} x {length}" if layout == "equal" else f"up to {length}",
        "is_causal": True,
    }
    return [columns | {"direction": direction, "impl": impl} for direction in DIRECTIONS for impl in NAMES]


def make_models(device: str, sizes: Row | None = None) -> dict[str, Any]:
    """The model of each implementation, by our names; their weights are shared. Needs Transformers."""
    import models

    made = models.make_models(sizes or {**models.LLAMA, "num_hidden_layers": LAYERS}, device)
    return {impl: made[name] for impl, name in NAMES.items()}


def bench_prefill(
    models_by_impl: dict[str, Any], layout: str, clock: Clock, batch: int = BATCH, length: int = LENGTH
) -> list[Row]:
    """Rows of the whole prefill and of its attention. The logits of both are compared first."""
    import models

    rows = {(row["direction"], row["impl"]): row for row in planned(layout, batch, length)}
    marks: dict[str, list[list[tuple[Any, Any]]]] = {impl: [] for impl in NAMES}
    runs: dict[str, Run] = {}
    expected: torch.Tensor | None = None
    for impl in reversed(NAMES):  # sdpa first: it is what ours is compared with
        call = prefill_call(models_by_impl[impl], layout, batch, length)
        run = timed_run(call, NAMES[impl], clock, marks[impl])
        try:
            with torch.no_grad():
                (logits,) = run.forward()
        except Exception as error:
            for direction in DIRECTIONS:
                rows[direction, impl]["error"] = error_text(error)
            continue
        runs[impl] = run
        if expected is not None:
            finding: Row = {"difference": relative_difference(logits, expected)}
            if not finding["difference"] <= models.TOLERANCE:
                finding["error"] = f"differs from sdpa by {finding['difference']:.1e}, more than {models.TOLERANCE:g}"
            for direction in DIRECTIONS:
                rows[direction, impl] |= finding
        expected = logits
        marks[impl].clear()
    for impl, samples in (interleave(runs, "forward", clock, ROUNDS, SECONDS) if runs else {}).items():
        sums = [sum(clock.milliseconds(*pair) for pair in calls) for calls in marks[impl][-len(samples) :]]
        rows["prefill", impl] |= summary(samples)
        rows["prefill_attention", impl] |= summary(sums)
    return list(rows.values())


def prefill_call(model: Any, layout: str, batch: int, length: int) -> Callable[[], torch.Tensor]:
    """The model on random tokens; returns the logits behind each sequence."""
    import models

    arguments = models.ARGUMENTS[layout](models.Workload("prefill", layout, length, batch), model)
    return lambda: model(**arguments, use_cache=False).logits.flatten(0, 1)


def timed_run(call: Callable[[], torch.Tensor], name: str, clock: Clock, marks: list[list[tuple[Any, Any]]]) -> Run:
    """A run of `call` that appends to `marks` the (start, stop) of each attention call in it."""

    def forward() -> tuple[torch.Tensor, ...]:
        with timed_attention(name, clock) as calls:
            logits = call()
        marks.append(calls)
        return (logits,)

    return Run((), forward, (), lambda outputs: outputs[0], lambda gradient: gradient)


@contextlib.contextmanager
def timed_attention(name: str, clock: Clock) -> Iterator[list[tuple[Any, Any]]]:
    """The (start, stop) of every call of the attention function that Transformers has under this name. Nothing is
    flushed: caches are as the model leaves them."""
    from transformers import AttentionInterface

    functions = AttentionInterface()
    function, calls = functions[name], list[tuple[Any, Any]]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock.stop()
        result = function(*args, **kwargs)
        calls.append((start, clock.stop()))
        return result

    functions.register(name, timed)
    try:
        yield calls
    finally:
        functions.register(name, function)
