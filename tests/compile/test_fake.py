"""Fake and meta tensors: shapes, dtypes and devices of results where nothing can be computed.

Autograd over fake CUDA tensors aborts the process on a machine without a GPU, so gradients of those are asked of the
backward op.
"""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

import fa_ops
from tests.support.cases import Inputs
from tests.support.problems import op_arguments, small_case

OPS = torch.ops.modelopt
CASES = {
    "packed": small_case(placement="gaps", memory="fused_qkv", dtype=torch.bfloat16, value_dim=24),
    "padded": small_case(is_padded=True, lens_k=(6, 9), key_mask="random", memory="head_major", dout="transposed"),
    "no_sequences": small_case(lens_q=()),
}
one_of_each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def moved(arguments: tuple, device: str) -> tuple:
    """`arguments` with empty tensors of the same strides on `device`."""
    return tuple(
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) if isinstance(t, torch.Tensor) else t
        for t in arguments
    )


def backward_arguments(inputs: Inputs) -> tuple:
    out, lse, block_bits, _ = OPS.varlen_attention(*op_arguments(inputs))
    return inputs.dout, torch.ones_like(lse), out, lse, block_bits, *op_arguments(inputs)


def check_alike(found: tuple, real: tuple, device: str) -> None:
    for one, expected in zip(found, real, strict=True):
        assert one.device.type == device
        assert (one.shape, one.dtype, one.stride()) == (expected.shape, expected.dtype, expected.stride())


@one_of_each
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake(device, case):
    inputs = case.build()
    arguments, arguments_of_backward = op_arguments(inputs), backward_arguments(inputs)
    with FakeTensorMode():
        forward = OPS.varlen_attention(*moved(arguments, device))
        backward = OPS.varlen_attention_backward(*moved(arguments_of_backward, device))
    check_alike(forward, OPS.varlen_attention(*arguments), device)
    check_alike(backward, OPS.varlen_attention_backward(*arguments_of_backward), device)


@one_of_each
def test_meta(case):
    arguments = op_arguments(case.build())
    check_alike(OPS.varlen_attention(*moved(arguments, "meta")), OPS.varlen_attention(*arguments), "meta")


@one_of_each
@pytest.mark.parametrize("is_fake", [False, True], ids=["meta", "fake_cpu"])
def test_autograd(is_fake, case):
    inputs = case.build()
    with FakeTensorMode() if is_fake else nullcontext():
        q, k, v, *others = moved(op_arguments(inputs), "cpu" if is_fake else "meta")
        tensors = [t.requires_grad_() for t in (q, k, v)]
        out, lse, block_bits, counts = OPS.varlen_attention(*tensors, *others)
        gradients = torch.autograd.grad((out, lse), tensors, (torch.empty_like(out), torch.empty_like(lse)))
    assert (out.requires_grad, lse.requires_grad, block_bits.requires_grad, counts.requires_grad) == (
        True, True, False, False,
    )  # fmt: skip
    for gradient, t in zip(gradients, tensors, strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (t.shape, t.dtype, t.device)


@one_of_each
def test_compile_of_fake_cuda_tensors(case, fresh_compiler):
    arguments, backend = op_arguments(case.build()), EagerAndRecordGraphs()
    compiled = torch.compile(OPS.varlen_attention, fullgraph=True, backend=backend)
    with FakeTensorMode(), torch.no_grad():
        found = compiled(*moved(arguments, "cuda"))
    check_alike(found, OPS.varlen_attention(*arguments), "cuda")
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_of_fake_cuda_tensors(strict, fresh_compiler):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, b_start_loc, b_seq_len):
            return fa_ops.attention(q, k, v, b_start_loc, b_seq_len)

    with FakeTensorMode():
        exported = torch.export.export(
            Attention(), moved(op_arguments(small_case().build())[:5], "cuda"), strict=strict
        )
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(OPS.varlen_attention.default) == 1
