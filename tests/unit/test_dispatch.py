"""What is saved of the CPU's time in eager mode is saved beside the dispatcher: whoever looks at ops sees the op."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from torch.utils._python_dispatch import TorchDispatchMode

import fa_ops
from fa_ops import ops
from tests.support.problems import op_arguments, small_case

FORWARD, BACKWARD = "modelopt.varlen_attention.default", "modelopt.varlen_attention_backward.default"


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [str(func)] * func.namespace.startswith("modelopt")
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor that is none, and notes what it is asked for."""

    seen: list[str]

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), 0, torch.contiguous_format, inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return func(*(x.inner if isinstance(x, Wrapped) else x for x in args), **(kwargs or {}))


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_mode_sees_one_op(context):
    inputs = small_case().build()
    with context(), Recorder() as recorder:
        inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
    assert recorder.seen == [FORWARD]


def test_a_mode_sees_both_ops_where_gradients_are_taken():
    inputs = small_case().build()
    q = inputs.q.detach().requires_grad_()
    with Recorder() as recorder:
        out, _ = inputs.call(fa_ops.attention, q, inputs.k, inputs.v)
        out.sum().backward()
    assert recorder.seen == [FORWARD, BACKWARD]


def test_a_subclass_sees_one_op():
    inputs = small_case().build()
    Wrapped.seen = []
    with torch.no_grad():
        found = inputs.call(fa_ops.attention, Wrapped(inputs.q), inputs.k, inputs.v)
        expected = inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
    assert Wrapped.seen.count(FORWARD) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_profiler_sees_the_op():
    inputs = small_case().build()
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
    assert [event.name for event in profile.function_events].count("modelopt::varlen_attention") == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions():
    """vmap loops, as over any op without a rule of its own; the gradient is refused, not wrong."""
    inputs = small_case().build()

    def call(q):
        return inputs.call(fa_ops.attention, q, inputs.k, inputs.v)[0]

    assert torch.equal(torch.vmap(call)(inputs.q[None])[0], call(inputs.q))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: call(q).sum())(inputs.q)


@pytest.mark.skipif(ops.IS_INTERPRETED or not ops.HAS_TRITON, reason="the ops have no kernels for CUDA tensors")
@pytest.mark.parametrize("name", ["varlen_attention", "varlen_attention_backward"])
def test_cuda_tensors_pass_the_wrappers_of_triton_op_by(name):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"modelopt::{name}", "CUDA")
    assert not has_kernel(f"modelopt::{name}", "CPU")


def test_without_wrappers_the_body_is_the_same():
    arguments = op_arguments(small_case().build())
    expected = torch.ops.modelopt.varlen_attention(*arguments)
    found = ops._without_wrappers(ops._varlen_attention)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ops._without_wrappers(lambda: is_wrap_triton_enabled())() is False
    assert is_wrap_triton_enabled()
