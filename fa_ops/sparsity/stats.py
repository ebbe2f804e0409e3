"""Measured shares of dropped blocks, and the summary that shows them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fa_ops.integrations.huggingface_models import attention_modules, implementation_of
from fa_ops.integrations.huggingface_pattern import ATTENTION_NAME
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.config import PHASES
from fa_ops.sparsity.methods.base import SparseAttentionMethod


@contextmanager
def collect_stats(model: nn.Module) -> Iterator[None]:
    """Within it all modules of a sparse model count their blocks, from 0 on; the counts stay until the next time."""
    methods = sparse_methods(model)
    before = {name: method.collect_stats for name, method in methods.items()}
    reset_stats(model)
    try:
        for method in methods.values():
            method.collect_stats = True
        yield
    finally:
        for name, method in methods.items():
            method.collect_stats = before[name]


def reset_stats(model: nn.Module) -> None:
    """Sets all counts of a sparse model to 0."""
    for method in sparse_methods(model).values():
        method.reset_counts()


def block_counts(model: nn.Module) -> dict[str, Tensor]:
    """By module, the blocks counted so far: (2, 2, Hq) int64 on the CPU: prefill and decode, visited and dropped.

    They are those of this process: of its own data, and under tensor parallelism of its own heads.
    """
    return {name: method.block_counts() for name, method in sparse_methods(model).items()}


def dropped_share(model: nn.Module, phase: str) -> float | None:
    """Dropped blocks as a share of those visited in "prefill" or "decode", over all modules that counted; None if none
    did."""
    if phase not in PHASES:
        raise ValueError(f"phase: {phase!r} given; accepted are {PHASES}")
    visited, dropped = _over_modules(block_counts(model))[PHASES.index(phase)].tolist()
    return dropped / visited if visited else None


def summary(model: nn.Module) -> str:
    """A table of the modules: their state, what decides in each phase, and the share measured there."""
    methods, counts, modules = sparse_methods(model), block_counts(model), attention_modules(model)
    first = next(iter(methods.values()))
    lines = [f"Sparse attention: {len(methods)} modules, {sum(m.is_enabled for m in methods.values())} enabled"]
    lines.append(f"{first.name}, backend {first.config.backend!r}")
    width = max(len(name) for name in methods)
    for name, method in methods.items():
        state = "on " if method.is_enabled else "off"
        info, measured = method.get_threshold_info(), counts[name].sum(-1).tolist()
        cells = [
            f"{phase} {describe_rule(info[phase])} {_percent(*own)}"
            for phase, own in zip(PHASES, measured, strict=True)
        ]
        if (implementation := implementation_of(modules[name])) != ATTENTION_NAME:
            cells.append(f"DENSE: its attention implementation is {implementation!r}")
        lines.append(f"{name:<{width}}  {state}  {method.config.br} x {method.config.bc}  {' | '.join(cells)}")
    return "\n".join([*lines, *_totals(methods, counts)])


def print_sparse_attention_summary(model: nn.Module) -> None:
    """Prints `summary(model)`."""
    print(summary(model))


def describe_rule(info: dict | None) -> str:
    """What decides in a phase, of `get_threshold_info`, in words."""
    if info is None:
        return "dense"
    if "thresholds" in info:
        return f"λ {', '.join(f'{value:.3g}' for value in info['thresholds'])}"
    return f"target {info['target']:.0%}, λ {info['threshold']:.3g} at {info['longest']:.0f} keys"


def _over_modules(counts: dict[str, Tensor]) -> Tensor:
    """(2, 2), of all modules together, however many heads each has."""
    return torch.stack([own.sum(-1) for own in counts.values()]).sum(0)


def _percent(visited: int, dropped: int) -> str:
    return f"dropped {dropped / visited:.1%} of {visited}" if visited else "not measured"


def _totals(methods: dict[str, SparseAttentionMethod], counts: dict[str, Tensor]) -> Iterator[str]:
    """By phase the measured share beside the one that calibration aimed at, where all enabled modules have one aim."""
    rules = [method.get_threshold_info() for method in methods.values() if method.is_enabled]
    for phase, (visited, dropped) in zip(PHASES, _over_modules(counts).tolist(), strict=True):
        aims = {(rule[phase] or {}).get("target") for rule in rules}
        wanted = f", {aims.pop():.1%} wanted" if len(aims) == 1 and None not in aims else ""
        share = "not measured" if not visited else "0 % dropped: this model runs dense" if not dropped else None
        yield f"{phase}: {share or f'{dropped / visited:.1%} of {visited} blocks dropped'}{wanted}"
