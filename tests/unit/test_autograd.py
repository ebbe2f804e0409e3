"""What autograd makes of fa_ops.attention, beside its numbers."""

import itertools

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad

import fa_ops
from fa_ops import ops
from fa_ops.reference import attention_reference
from tests.support.accuracy import ErrorPool, check_case, evaluate
from tests.support.cases import Inputs
from tests.support.problems import op_arguments, small_case

OP = torch.ops.modelopt.varlen_attention
LAYOUTS = {"packed": small_case(placement="gaps", seed=1), "padded": small_case(is_padded=True, key_mask="random")}
each_layout = pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))


def results(inputs: Inputs) -> dict[str, Tensor]:
    return evaluate(fa_ops.attention, inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_padded": True, "placement": "left", "key_mask": "hole"},
        {"lens_q": (40, 9), "lens_k": (25, 40)},
        {"value_dim": 24, "is_causal": False},
        {"is_padded": True, "memory": "head_major", "lens_k": (30, 5)},
        {"window_size": (5, -1), "softcap": 2.0, "has_sinks": True},
    ],
    ids=["packed", "padded_hole", "len_q_above_len_k", "value_dim", "padded_cache", "features"],
)
def test_lse_is_differentiable(changes):
    check_case(fa_ops.attention, small_case(**{"lens_q": (21, 17), "has_dlse": True} | changes))


def test_lse_alone_is_differentiable():
    inputs = small_case(lens_q=(21, 17), has_dlse=True).build()

    def gradients(attention, dtype, **options):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
        _, lse = inputs.call(attention, q, k, v, **options)
        return torch.autograd.grad(lse, (q, k, v), inputs.dlse.to(lse.dtype), materialize_grads=True)

    found, exact = gradients(fa_ops.attention, torch.float32), gradients(attention_reference, torch.float64)
    references = [
        gradients(attention_reference, torch.float32, upcast=False, reorder_ops=reorder) for reorder in (False, True)
    ]
    for i, name in enumerate(("dq", "dk")):
        pool = ErrorPool(name)
        pool.add(found[i], exact[i], [reference[i] for reference in references])
        assert pool.excess() is None
    assert (found[2] == 0).all(), "lse does not depend on v"


@each_layout
def test_gradients_of_only_some_inputs(case):
    inputs = case.build()
    expected = results(inputs)
    for wanted in itertools.product([False, True], repeat=3):
        tensors = [
            t.detach().requires_grad_(is_wanted)
            for t, is_wanted in zip((inputs.q, inputs.k, inputs.v), wanted, strict=True)
        ]
        out, lse = inputs.call(fa_ops.attention, *tensors)
        assert out.requires_grad is lse.requires_grad is any(wanted)
        if any(wanted):
            out.backward(inputs.dout)
        for name, t, is_wanted in zip(("dq", "dk", "dv"), tensors, wanted, strict=True):
            assert (t.grad is not None) is is_wanted
            assert t.grad is None or torch.equal(t.grad, expected[name])


def test_one_tensor_given_as_q_k_and_v():
    inputs = small_case(heads_kv=2, group_size=1).build()
    x = inputs.q.detach().requires_grad_()
    out, _ = inputs.call(fa_ops.attention, x, x, x)
    inputs.k = inputs.v = inputs.q
    apart = results(inputs)
    assert torch.equal(out, apart["out"])
    (dx,) = torch.autograd.grad(out, x, inputs.dout)
    torch.testing.assert_close(dx, apart["dq"] + apart["dk"] + apart["dv"])


def test_views_of_one_projection():
    inputs = small_case(lens_q=(21, 17), memory="fused_qkv").build()
    expected = results(inputs)
    qkv = torch.cat([t.flatten(1) for t in (inputs.q, inputs.k, inputs.v)], 1).requires_grad_()
    q, k, v = qkv.split([64, 32, 32], 1)
    out, _ = inputs.call(fa_ops.attention, *(t.unflatten(1, (-1, 16)) for t in (q, k, v)))
    (dqkv,) = torch.autograd.grad(out, qkv, inputs.dout)
    assert torch.equal(dqkv, torch.cat([expected[name].flatten(1) for name in ("dq", "dk", "dv")], 1))


@each_layout
def test_rows_that_see_nothing_have_gradient_zero_whatever_arrives_there(case):
    inputs = case.build()
    tensors = leaves(inputs)
    out, lse = inputs.call(fa_ops.attention, *tensors)
    dout = torch.where(inputs.sees[..., None, None], 1.0, torch.nan).expand_as(out)
    dlse = torch.where(inputs.sees[..., None], 1.0, torch.nan).expand(out.shape[:-1]).transpose(-1, -2)
    dq, dk, dv = torch.autograd.grad((out, lse), tensors, (dout, dlse))
    assert not inputs.sees.all(), "the case has such rows"
    assert (dq[~inputs.sees] == 0).all()
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()


@each_layout
def test_the_op_has_the_same_autograd(case):
    """fa_ops.attention comes to it by a way of its own, without gradients and with them."""
    inputs = case.build()
    arguments = op_arguments(inputs)[3:]

    def gradients(attend) -> list[Tensor]:
        tensors = leaves(inputs)
        out, lse, block_bits, counts = attend(*tensors, *arguments)
        assert [t.requires_grad for t in (out, lse, block_bits, counts)] == [True, True, False, False]
        return [out, lse, *torch.autograd.grad((out, lse), tensors, (inputs.dout.nan_to_num(), torch.ones_like(lse)))]

    for found, expected in zip(gradients(ops.attend), gradients(OP), strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        for found, expected in zip(
            ops.attend(*leaves(inputs), *arguments), OP(*leaves(inputs), *arguments), strict=True
        ):
            assert torch.equal(found, expected)
            assert found.grad_fn is None


def test_double_backward_raises():
    inputs = small_case().build()
    tensors = leaves(inputs)
    out, _ = inputs.call(fa_ops.attention, *tensors)
    (dq,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"modelopt\.varlen_attention_backward.*no autograd formula"):
        dq.sum().backward()


@pytest.mark.parametrize("position", range(3), ids=["q", "k", "v"])
def test_forward_mode_raises(position):
    inputs = small_case().build()
    tensors = [inputs.q, inputs.k, inputs.v]
    message = "^q, k, v: forward-mode differentiation is not supported; use reverse mode$"

    def attend(t):
        return inputs.call(fa_ops.attention, *tensors[:position], t, *tensors[position + 1 :])

    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(attend, (tensors[position],), (torch.ones_like(tensors[position]),))
    with forward_ad.dual_level():
        attend(tensors[position])
        dual = forward_ad.make_dual(tensors[position], torch.ones_like(tensors[position]))
        with pytest.raises(NotImplementedError, match=message):
            attend(dual)


def test_a_tensor_changed_since_the_forward_raises():
    inputs = small_case().build()
    q, k, v = leaves(inputs)
    out, _ = inputs.call(fa_ops.attention, q, k, v)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bits_and_counts_have_no_gradient():
    inputs = small_case().build()
    out, lse, block_bits, counts = OP(*leaves(inputs), inputs.b_start_loc, inputs.b_seq_len)
    assert out.requires_grad
    assert lse.requires_grad
    for t, dtype in ((block_bits, torch.int32), (counts, torch.int64)):
        assert not t.requires_grad
        assert (t.shape, t.dtype) == ((0,), dtype)


def test_checkpoint():
    inputs = small_case(has_dlse=True).build()
    expected = results(inputs)

    def attend(q, k, v):
        return inputs.call(fa_ops.attention, q, k, v)

    tensors = leaves(inputs)
    outputs = torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False)
    gradients = torch.autograd.grad(outputs, tensors, (inputs.dout, inputs.dlse))
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert torch.equal(gradient, expected[name])


def test_nothing_is_recorded_without_need():
    inputs = small_case().build()
    with torch.no_grad():
        out, lse = inputs.call(fa_ops.attention, *leaves(inputs))
    assert not out.requires_grad
    assert not lse.requires_grad
    expected = results(inputs)
    with torch.inference_mode():
        out, lse = inputs.call(fa_ops.attention, *(t.clone() for t in (inputs.q, inputs.k, inputs.v)))
        assert out.is_inference()
    assert torch.equal(out, expected["out"])
    assert torch.equal(lse, expected["lse"])


def test_sinks_alone_are_differentiable():
    inputs = small_case(has_sinks=True, lens_q=(9, 4), lens_k=(4, 6)).build()
    sinks = inputs.sinks.detach().requires_grad_()
    gradients = []
    for attention in (fa_ops.attention, attention_reference):
        out, lse = inputs.call(attention, inputs.q, inputs.k, inputs.v, sinks=sinks)
        gradients += torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), sinks)
    torch.testing.assert_close(*gradients)
