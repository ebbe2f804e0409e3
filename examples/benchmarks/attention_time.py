"""How long attention takes inside a model that is compiled into one graph.

The attention function that Transformers calls by name is put between two calls of an operator, which the compiler can
neither leave out nor move: it waits for queries, keys and values, and then for the output. While somebody listens the
operator reads a clock; else it does nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import Clock
from torch import Tensor
from transformers import AttentionInterface

_read: Callable[[], None] | None = None  # what a mark does


@torch.library.custom_op("fa_ops_benchmarks::mark", mutates_args=("x",))
def mark(x: Tensor, others: list[Tensor]) -> None:
    """Changes nothing: what uses x afterwards comes after it, and all of them before."""
    if _read is not None:
        _read()


@mark.register_fake
def _(x: Tensor, others: list[Tensor]) -> None:
    pass


@contextlib.contextmanager
def marked_attention(*names: str) -> Iterator[None]:
    """Within it models whose attention implementation has one of these names can be listened to."""
    functions = AttentionInterface()
    before = {name: functions[name] for name in names}
    for name, function in before.items():
        functions.register(name, _marked(function))
    try:
        yield
    finally:
        for name, function in before.items():
            functions.register(name, function)


def _marked(function: Callable) -> Callable:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        mark(query, [key, value])
        out, weights = function(module, query, key, value, *args, **kwargs)
        mark(out, [])
        return out, weights

    return attention


def attention_milliseconds(call: Callable[[], Any], clock: Clock, calls: int) -> list[float]:
    """Of each of `calls` calls of a marked model, the sum over its layers. What the device has to do for a first call
    keeps it busy while Python goes ahead."""
    global _read
    marks: list[list[Any]] = []
    call()
    _read = lambda: marks[-1].append(clock.stop())  # noqa: E731
    try:
        for _ in range(calls):
            marks.append([])
            call()
    finally:
        _read = None
    return [sum(clock.milliseconds(*pair) for pair in zip(own[::2], own[1::2], strict=True)) for own in marks]
