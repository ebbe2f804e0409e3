"""Opaque ops for CPU tensors, called by the public ops' bodies: lengths steer their loops, so they cannot be traced."""

from collections.abc import Callable

import torch

from fa_ops import cpu, cpu_skip
from fa_ops_meta import outputs

_library = torch.library.Library("modelopt", "FRAGMENT")

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor b_start_loc, Tensor b_seq_len, Tensor b_start_loc_k, Tensor b_seq_len_k, "
    "Tensor? key_mask, Tensor? sinks"
)
_NUMBERS = "float softmax_scale, float softcap, SymInt window_left, SymInt window_right"
_BLOCKS = "int skip_softmax_block_q, int skip_softmax_block_k"
_GRADIENTS = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse"


def _define(name: str, returns: str, schema: str, allocate: Callable, compute: Callable) -> Callable:
    def run(*args):
        results = allocate(*args)
        compute(*args, *results)
        return results

    _library.define(f"{name}({schema}) -> ({returns})", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"modelopt::{name}", allocate, lib=_library)
    return getattr(torch.ops.modelopt, name).default


def _allocate_with_skip(q, k, v, start, length, start_k, length_k, key_mask, sinks, block_table, *numbers):
    return *outputs.empty_forward(q, v), *outputs.empty_skip(q, k, length, numbers[-2:], block_table)


forward = _define(
    "_varlen_attention_cpu",
    "Tensor, Tensor",
    f"{_TENSORS}, Tensor? block_table, {_NUMBERS}",
    lambda q, k, v, *_: outputs.empty_forward(q, v),
    cpu.varlen_attention_cpu,
)
backward = _define(
    "_varlen_attention_backward_cpu",
    "Tensor, Tensor, Tensor",
    f"{_GRADIENTS}, {_TENSORS}, {_NUMBERS}",
    lambda dout, dlse, out, lse, q, k, v, *_: outputs.empty_backward(q, k, v),
    cpu.varlen_attention_backward_cpu,
)
skip_forward = _define(
    "_skip_softmax_attention_cpu",
    "Tensor, Tensor, Tensor, Tensor",
    f"{_TENSORS}, Tensor? block_table, Tensor threshold, {_NUMBERS}, {_BLOCKS}",
    _allocate_with_skip,
    cpu_skip.varlen_attention_skip_cpu,
)
skip_backward = _define(
    "_skip_softmax_attention_backward_cpu",
    "Tensor, Tensor, Tensor",
    f"{_GRADIENTS}, Tensor block_bits, {_TENSORS}, {_NUMBERS}, {_BLOCKS}",
    lambda dout, dlse, out, lse, block_bits, q, k, v, *_: outputs.empty_backward(q, k, v),
    cpu_skip.varlen_attention_skip_backward_cpu,
)
