"""DTensor rules of the ops: heads are sharded, or everything is replicated; tokens never are.

DTensor redistributes what comes otherwise (sharded tokens, pending sums) to the cheaper of the two. Starts, lengths,
key_mask and block_table are replicated. Importing this module imports DTensor.
"""

import functools
import itertools
import math
from typing import Any

import torch
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# a rule gives the placements of the outputs and of the arguments; None stands for what is no tensor
Rule = tuple[list[Placement | None], list[Placement | None]]


@functools.cache
def register_sharding_rules() -> None:
    """Makes the rules known to DTensor. The ops must be defined."""
    for op, outputs in (
        (torch.ops.modelopt.varlen_attention.default, ("out", "lse", "block_bits", "counts")),
        (torch.ops.modelopt.varlen_attention_backward.default, ("dq", "dk", "dv", "dsinks")),
    ):
        names = [argument.name for argument in op._schema.arguments]
        register_sharding(op)(functools.partial(_rules, names, outputs))
    register_sharding(torch.ops.modelopt._disjoint_starts.default)(_starts_rules)


def _rules(names: list[str], outputs: tuple[str, ...], *arguments: Any) -> list[Rule]:
    """The rules for the arguments of an op, tensors as DTensor's specs of them; trailing defaults may be missing."""
    given = dict(zip(names, arguments, strict=False))
    k = given["k"]
    rules = [_rule({}, outputs, given)]
    if _shards_evenly(k.shape[-2], k.mesh.shape):
        rank_q = given["q"].ndim  # a paged cache may have one more
        sharded = dict.fromkeys(("q", "out", "dout", "dq"), Shard(rank_q - 2))
        sharded |= dict.fromkeys(("k", "v", "dk", "dv"), Shard(k.ndim - 2))
        sharded |= dict.fromkeys(("lse", "dlse"), Shard(rank_q - 3))
        if given.get("sinks") is not None:
            sharded |= {"sinks": Shard(0), "dsinks": Shard(0)}
        threshold = given.get("skip_softmax_threshold")
        if threshold is not None:
            sharded |= {"block_bits": Shard(0), "counts": Shard(2)}
            if threshold.ndim == 2:
                sharded["skip_softmax_threshold"] = Shard(1)
        rules.append(_rule(sharded, outputs, given))
    return rules


def _starts_rules(start: Any, length: Any, rows: int, gradient: Any) -> list[Rule]:
    """All replicated but the gradient, which is not read."""
    placements = [Replicate(), *map(Shard, range(gradient.ndim))]
    return [([Replicate()], [Replicate(), Replicate(), None, placement]) for placement in placements]


def _rule(sharded: dict[str, Shard], outputs: tuple[str, ...], given: dict[str, Any]) -> Rule:
    """What `sharded` does not name is replicated."""
    return (
        [sharded.get(name, Replicate()) for name in outputs],
        [sharded.get(name, Replicate()) if hasattr(x, "placements") else None for name, x in given.items()],
    )


def _shards_evenly(heads: int, mesh_shape: tuple[int, ...]) -> bool:
    """Whether each shard of q gets the key heads of its query heads, on whichever dimensions of the mesh DTensor
    shards: it tries all of them, but for those that make more shards than heads."""
    shards = (math.prod(dims) for n in range(len(mesh_shape)) for dims in itertools.combinations(mesh_shape, n + 1))
    return all(heads % n == 0 for n in shards if n <= heads)
