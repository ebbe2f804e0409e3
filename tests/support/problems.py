"""One small valid problem, which tests change in the one thing that they are about."""

import dataclasses
import itertools
import random

import torch

from tests.support.cases import Case, Inputs

_SMALL = Case(
    seed=0,
    dtype=torch.float32,
    is_padded=False,
    placement="tight",
    lens_q=(5, 7),
    lens_k=None,
    heads_kv=2,
    group_size=2,
    head_dim=16,
    value_dim=16,
    is_causal=True,
    softmax_scale=None,
    key_mask=None,
    memory="contiguous",
    dout="dense",
    has_dlse=False,
    index_dtype=torch.int32,
    max_input_len="none",
)


def small_case(**changes) -> Case:
    """Two packed causal sequences, float32, two heads per key head; padded ones have their pads on the right."""
    if changes.get("is_padded"):
        changes = {"placement": "right"} | changes
    return dataclasses.replace(_SMALL, **changes)


def decoding_case(lens_k: tuple[int, ...], lens_q: tuple[int, ...] | None = None, **changes) -> Case:
    """Padded queries of one row, or of none, and not a row more: the seed decides about room behind them."""
    seed = next(n for n in itertools.count(changes.pop("seed", 0)) if random.Random(n).choice((0, 1, 5)) == 0)
    return small_case(is_padded=True, lens_q=lens_q or (1,) * len(lens_k), lens_k=lens_k, seed=seed, **changes)


def op_arguments(inputs: Inputs) -> tuple:
    """What `torch.ops.modelopt.varlen_attention` takes, all of it, in its order."""
    case, threshold = inputs.case, inputs.skip_softmax_threshold
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device=inputs.q.device)
    return (
        inputs.q, inputs.k, inputs.v, inputs.b_start_loc, inputs.b_seq_len, inputs.max_input_len,
        case.is_causal, case.softmax_scale, inputs.b_start_loc_k, inputs.b_seq_len_k, inputs.max_input_len_k,
        *case.window_size, case.softcap, inputs.sinks, inputs.key_mask, None, True,
        threshold, *case.skip_block,
    )  # fmt: skip
