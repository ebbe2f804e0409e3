"""What the op is for AOTAutograd on CUDA, traced without a GPU: kernels that write their outputs and nothing else.

torch reads from a kernel's unoptimised code what it writes, and follows the arguments of every helper whose result an
address depends on. A kernel that seems to write one of its inputs makes compiled programs clone it, copy it back into
the caller's tensor, and give up CUDA graphs.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import triton
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.backends.compiler import GPUTarget

from fa_ops import decoding, hopper, hopper_backward, launching, ops
from fa_ops_meta import outputs
from tests.support.paged import paged_arguments
from tests.support.problems import op_arguments, small_case

CASES = {
    "packed": small_case(dtype=torch.bfloat16, lens_k=(6, 9), has_dlse=True),
    "padded": small_case(dtype=torch.bfloat16, is_padded=True, lens_k=(6, 9), key_mask="random", memory="head_major"),
    "window_softcap": small_case(dtype=torch.bfloat16, window_size=(3, 1), is_causal=False, softcap=2.0, has_dlse=True),
}
# without its backward, where sinks take indexing that a CPU build of torch refuses for fake CUDA tensors
FORWARD_CASES = CASES | {"sinks": small_case(dtype=torch.bfloat16, has_sinks=True)}


@pytest.fixture(params=["sm_80", "sm_90"])
def an_imagined_gpu(request, monkeypatch):
    """A compilation target, but no device."""
    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", int(request.param.removeprefix("sm_")), 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launching, "architecture_of", lambda device: request.param)
    monkeypatch.setattr(hopper, "_capability", lambda device: (int(request.param[3]), int(request.param[4])))
    monkeypatch.setattr(ops, "device_of", lambda t: nullcontext())


def trace(body, arguments: tuple) -> torch.fx.Graph:
    """The functional trace of an op's body on fake CUDA tensors."""
    with FakeTensorMode():
        on_cuda = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") if isinstance(t, torch.Tensor) else t
            for t in arguments
        ]
        tensors = [t for t in on_cuda if isinstance(t, torch.Tensor)]

        def call(*tensors):
            given = iter(tensors)
            return body(*(next(given) if isinstance(t, torch.Tensor) else t for t in on_cuda))

        return make_fx(dispatch_functionalize(call))(*tensors).graph


def launches(body, arguments: tuple) -> list[torch.fx.Node]:
    """The kernel launches in it."""
    is_launch = torch.ops.higher_order.triton_kernel_wrapper_functional
    return [node for node in trace(body, arguments).nodes if node.target is is_launch]


@pytest.mark.parametrize("case", FORWARD_CASES.values(), ids=FORWARD_CASES.keys())
def test_forward_writes_its_outputs_only(case, an_imagined_gpu):
    (launch,) = launches(ops._varlen_attention, op_arguments(case.build()))
    assert launch.kwargs["tensors_to_clone"] == ["out_ptr", "lse_ptr"]


@pytest.mark.parametrize("page_size", [1, 4, 64], ids=["pages_of_one_key", "single_keys", "whole_blocks"])
@pytest.mark.parametrize("skip_share", [None, 0.5], ids=["dense", "skip_softmax"])
def test_a_paged_cache_is_only_read(page_size, skip_share, an_imagined_gpu, monkeypatch):
    monkeypatch.setattr(decoding, "select_splits", lambda *args: None)
    inputs = small_case(dtype=torch.bfloat16, lens_q=(20, 3), lens_k=(70, 9), skip_share=skip_share).build()
    (launch,) = launches(ops._varlen_attention, paged_arguments(inputs, page_size))
    written = ["out_ptr", "lse_ptr"] + ["block_bits_ptr", "counts_ptr"] * (skip_share is not None)
    assert launch.kwargs["tensors_to_clone"] == written


DECODE_CASES = {
    "padded": (small_case(dtype=torch.bfloat16, is_padded=True, lens_q=(1, 1), lens_k=(70, 9), has_sinks=True), None),
    "padded_skip_softmax_key_mask": (
        small_case(
            dtype=torch.bfloat16, is_padded=True, lens_q=(1, 1), lens_k=(70, 40), key_mask="random", skip_share=0.5,
            skip_block=(16, 16), window_size=(60, -1),
        ),
        None,
    ),
    "packed_paged": (small_case(dtype=torch.bfloat16, lens_q=(1, 3), lens_k=(70, 9)), 4),
    "packed_paged_skip_softmax": (
        small_case(dtype=torch.bfloat16, lens_q=(1, 3), lens_k=(70, 9), skip_share=0.5, skip_block=(16, 16)), 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "page_size"), DECODE_CASES.values(), ids=DECODE_CASES.keys())
def test_decode_kernels_write_their_outputs_only(case, page_size, an_imagined_gpu, monkeypatch):
    monkeypatch.setattr(decoding, "select_splits", lambda *args: 2)
    inputs = case.build()
    arguments = op_arguments(inputs) if page_size is None else paged_arguments(inputs, page_size)
    decode, combine, *forward = launches(ops._varlen_attention, arguments)
    skipped = ["block_bits_ptr", "counts_ptr"] * (case.skip_share is not None)
    assert decode.kwargs["tensors_to_clone"] == ["part_out_ptr", "part_lse_ptr", *skipped]
    assert combine.kwargs["tensors_to_clone"] == ["out_ptr", "lse_ptr"]
    assert [launch.kwargs["tensors_to_clone"] for launch in forward] == [["out_ptr", "lse_ptr", *skipped]] * (
        page_size is not None
    )


SKIP_CASES = {
    "packed": small_case(dtype=torch.bfloat16, lens_q=(70, 9), skip_share=0.5, skip_block=(16, 16)),
    "padded": small_case(
        dtype=torch.bfloat16, is_padded=True, lens_q=(70, 9), key_mask="random", skip_share=0.5, skip_block=(16, 16)
    ),
}


@pytest.mark.parametrize("case", SKIP_CASES.values(), ids=SKIP_CASES.keys())
def test_skip_softmax_writes_its_outputs_only(case, an_imagined_gpu):
    (launch,) = launches(ops._varlen_attention, op_arguments(case.build()))
    assert launch.kwargs["tensors_to_clone"] == ["out_ptr", "lse_ptr", "block_bits_ptr", "counts_ptr"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backward_writes_its_outputs_only(case, an_imagined_gpu):
    inputs = case.build()
    arguments = op_arguments(inputs)
    out, lse, block_bits, _ = torch.ops.modelopt.varlen_attention(*arguments)
    dq, dkv = launches(ops._varlen_attention_backward, (inputs.dout, inputs.dlse, out, lse, block_bits, *arguments))
    assert dq.kwargs["tensors_to_clone"] == ["delta_ptr", "dq_ptr"]
    assert dkv.kwargs["tensors_to_clone"] == ["dk_ptr", "dv_ptr"]


def test_arguments_of_the_kernels_are_not_copied(an_imagined_gpu):
    """A head-major cache goes to the kernel as it is: the launch is given the op's own arguments."""
    inputs = small_case(dtype=torch.bfloat16, is_padded=True, memory="head_major").build()
    (launch,) = launches(ops._varlen_attention, op_arguments(inputs))
    assert all(launch.kwargs["kwargs"][name].op == "placeholder" for name in ("q_ptr", "k_ptr", "v_ptr"))


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_sm_90_is_one_opaque_op(is_padded: bool, an_imagined_gpu, monkeypatch):
    """It is given the op's own arguments, and nothing is launched around it."""
    monkeypatch.setattr(hopper, "refusal", hopper.unsupported)
    case = small_case(
        dtype=torch.bfloat16, head_dim=64, value_dim=64, is_padded=is_padded, lens_k=(6, 9), memory="head_major"
    )
    graph = trace(ops._varlen_attention, op_arguments(case.build()))
    (node,) = (node for node in graph.nodes if node.target is hopper.forward)
    assert [arg.op for arg in node.args[:7]] == ["placeholder"] * 7
    assert not [node for node in graph.nodes if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional]


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_the_backward_for_sm_90_is_one_opaque_op(is_padded: bool, an_imagined_gpu, monkeypatch):
    monkeypatch.setattr(hopper_backward, "refusal", hopper_backward.unsupported)
    case = small_case(
        dtype=torch.bfloat16, head_dim=64, value_dim=64, is_padded=is_padded, lens_k=(6, 9), has_dlse=True
    )
    inputs = case.build()
    arguments = op_arguments(inputs)
    out, lse, block_bits, _ = torch.ops.modelopt.varlen_attention(*arguments)
    gradients = inputs.dout, inputs.dlse, out, lse
    graph = trace(ops._varlen_attention_backward, (*gradients, block_bits, *arguments))
    (node,) = (node for node in graph.nodes if node.target is hopper_backward.backward)
    assert [arg.op for arg in node.args[:11]] == ["placeholder"] * 11
    assert not [node for node in graph.nodes if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional]


# q, k and v of a length S, or a table of S pages, and whether there is a backward
DYNAMIC = {
    "packed": (lambda n: ((n, 4, 64), (n, 2, 64)), True),
    "padded": (lambda n: ((2, n, 4, 64), (2, n, 2, 64)), True),
    "decode": (lambda n: ((2, 1, 4, 64), (2, n, 2, 64)), False),
    "paged": (lambda n: ((6, 4, 64), (50, 16, 2, 64)), False),
}


def guards_of(layout: str, is_backward: bool, has_threshold: bool, example: int) -> tuple:
    """The symbol of S, and what the trace of a body on fake CUDA tensors asks of it."""
    shapes = ShapeEnv()
    name = ConstantSource("length")
    symbol = shapes.create_symbol(example, name, DimDynamic.DYNAMIC, None)
    size = shapes.create_symintnode(symbol, hint=example, source=name)
    with FakeTensorMode(shape_env=shapes):
        q, k = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in DYNAMIC[layout][0](size))
        v = torch.empty_like(k)
        index = torch.empty(2, dtype=torch.int32, device="cuda")
        start_k = index if layout == "decode" else None
        length_k = None if layout in ("packed", "padded") else index
        table = torch.empty((2, size), dtype=torch.int32, device="cuda") if layout == "paged" else None
        threshold = torch.empty((), device="cuda") if has_threshold else None
        arguments = (
            q, k, v, index, index, None, True, None, start_k, length_k, None, -1, -1, 0.0, None, None, table, True,
            threshold, 64, 128,
        )  # fmt: skip
        body = ops._varlen_attention
        if is_backward:
            body = ops._varlen_attention_backward
            out, lse = outputs.empty_forward(q, v)
            block_bits, _ = outputs.empty_skip(q, k, index, (64, 128) if has_threshold else None)
            arguments = torch.empty_like(out), torch.empty_like(lse), out, lse, block_bits, *arguments
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]

        def call(*tensors):
            given = iter(tensors)
            return body(*(next(given) if isinstance(t, torch.Tensor) else t for t in arguments))

        make_fx(dispatch_functionalize(call))(*tensors)
    return symbol, [guard.expr for guard in shapes.guards]


@pytest.mark.parametrize("has_threshold", [False, True], ids=["dense", "skip_softmax"])
@pytest.mark.parametrize(
    ("layout", "is_backward"),
    [(layout, is_backward) for layout, (_, has) in DYNAMIC.items() for is_backward in (False, True)[: 1 + has]],
)
def test_one_graph_for_all_lengths(layout, is_backward, has_threshold, an_imagined_gpu, monkeypatch):
    """What a trace at one length asks of it is answered alike by all."""
    for module in (decoding, hopper, hopper_backward):
        monkeypatch.setattr(module, "multi_processors", lambda device: 132)
    for example in (40, 5000):
        symbol, guards = guards_of(layout, is_backward, has_threshold, example)
        lengths = 2, 3, 64, 65, 700, 5000, 10**6
        assert not [(n, str(guard)) for guard in guards for n in lengths if not guard.subs(symbol, n)]
