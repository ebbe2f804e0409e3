"""No result depends on the dtype that torch gives to tensors by default."""

import pytest
import torch

import fa_ops
from fa_ops.reference import attention_reference
from tests.support.problems import op_arguments, small_case

CASES = {
    "packed": small_case(has_dlse=True),
    "bfloat16": small_case(dtype=torch.bfloat16, lens_k=(6, 9)),
    "sinks": small_case(has_sinks=True, has_dlse=True, window_size=(3, -1)),
    "softcap_value_dim": small_case(softcap=2.0, value_dim=24, softmax_scale=-0.3),
    "padded_holes": small_case(is_padded=True, placement="left", key_mask="random", has_dlse=True),
    "skip_softmax": small_case(
        lens_q=(70, 9), skip_share=0.5, skip_block=(16, 16), skip_form="head", has_sinks=True, softcap=2.0
    ),
    "skip_softmax_number": small_case(is_padded=True, lens_q=(70, 40), skip_share=0.5, skip_block=(16, 16)),
    "decode": small_case(is_padded=True, lens_q=(1, 1), lens_k=(6, 9)),
}


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def default_dtype(request):
    """Sets the default dtype, when called, until the test ends."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def run(attention, inputs) -> tuple[torch.Tensor, ...]:
    tensors = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    results = inputs.call(attention, *tensors)[: 1 + inputs.case.has_dlse]
    return *results, *torch.autograd.grad(results, tensors, (inputs.dout, inputs.dlse)[: len(results)])


def check_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("attention", [fa_ops.attention, attention_reference], ids=["op", "reference"])
def test_results_are_the_same_bits(attention, case, default_dtype):
    inputs = case.build()
    expected = run(attention, inputs)
    default_dtype()
    check_equal(run(attention, inputs), expected)


def test_every_output_of_the_op_is_the_same(default_dtype):
    arguments = op_arguments(CASES["skip_softmax"].build())
    expected = torch.ops.modelopt.varlen_attention(*arguments)
    default_dtype()
    check_equal(torch.ops.modelopt.varlen_attention(*arguments), expected)
    _, _, *dense = torch.ops.modelopt.varlen_attention(*arguments[:18])
    assert [t.dtype for t in dense] == [t.dtype for t in expected[2:]]


def test_starts_and_lengths(default_dtype):
    mask = torch.tensor([[False, True, True], [True, False, True]])
    expected = [
        *fa_ops.varlen.from_cu_seqlens(torch.tensor([0, 2, 5])), *fa_ops.varlen.from_lengths(torch.tensor([2, 3])),
        *fa_ops.varlen.from_mask(mask), *fa_ops.varlen.from_document_starts(~mask, 3),
    ]  # fmt: skip
    default_dtype()
    found = [
        *fa_ops.varlen.from_cu_seqlens(torch.tensor([0, 2, 5])), *fa_ops.varlen.from_lengths(torch.tensor([2, 3])),
        *fa_ops.varlen.from_mask(mask), *fa_ops.varlen.from_document_starts(~mask, 3),
    ]  # fmt: skip
    check_equal(found, expected)


def test_varlen_attn(default_dtype):
    q, cu_seq = torch.randn(9, 2, 16), torch.tensor([0, 4, 9])
    expected = fa_ops.varlen_attn(q, q, q, cu_seq, cu_seq, 5, 5, window_size=(-1, 0))
    default_dtype()
    check_equal([fa_ops.varlen_attn(q, q, q, cu_seq, cu_seq, 5, 5, window_size=(-1, 0))], [expected])
