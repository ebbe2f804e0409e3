"""fa_ops.varlen_attn: called as torch's varlen_attn, computed as fa_ops.attention."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen as varlen_of_torch
from torch.nn.attention.varlen import AuxRequest

import fa_ops

LENGTHS_Q, LENGTHS_K = (3, 1, 5), (6, 4, 5)


def cumulative(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def inputs(heads=4, heads_kv=4):
    shapes = (sum(LENGTHS_Q), heads), (sum(LENGTHS_K), heads_kv), (sum(LENGTHS_K), heads_kv)
    return [torch.randn(*shape, 16, requires_grad=True) for shape in shapes]


def call(q, k, v, **kwargs):
    return fa_ops.varlen_attn(q, k, v, cumulative(LENGTHS_Q), cumulative(LENGTHS_K), 5, 6, **kwargs)


def sdpa(q, k, v, window_size=(-1, -1), used=LENGTHS_K, scale=None):
    left, right = window_size
    outs, lses = [], []
    for q_i, k_i, v_i, length in zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), used, strict=True):
        k_i, v_i = k_i[:length], v_i[:length]
        distance = torch.arange(length) - torch.arange(len(q_i))[:, None] - (length - len(q_i))
        sees = (distance >= -left if left >= 0 else True) & (distance <= right if right >= 0 else distance == distance)
        q_i, k_i, v_i = (t.transpose(0, 1) for t in (q_i, k_i, v_i))
        outs.append(F.scaled_dot_product_attention(q_i, k_i, v_i, sees, scale=scale, enable_gqa=True).transpose(0, 1))
        scores = q_i @ k_i.repeat_interleave(len(q_i) // len(k_i), 0).transpose(1, 2) * (scale or 0.25)
        lses.append(scores.masked_fill(~sees, -torch.inf).logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
def test_forward_and_gradients(window_size):
    tensors = inputs()
    results = call(*tensors, window_size=window_size, scale=0.3, return_aux=AuxRequest(lse=True))
    expected = sdpa(*tensors, window_size, scale=0.3)
    for name, found, wanted in zip(("out", "lse"), results, expected, strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")
    weights = [torch.randn_like(t) for t in results]
    torch.testing.assert_close(*(torch.autograd.grad(both, tensors, weights) for both in (results, expected)))


def test_grouped_heads():
    tensors = inputs(heads_kv=2)
    torch.testing.assert_close(call(*tensors, enable_gqa=True), sdpa(*tensors)[0])
    with pytest.raises(ValueError, match="enable_gqa: False given, with 4 heads of query and 2 of key"):
        call(*tensors)


@pytest.mark.parametrize("num_splits", [None, 1, 4])
def test_used_keys(num_splits):
    tensors, used = inputs(), (3, 2, 5)
    out = call(*tensors, window_size=(-1, 0), seqused_k=torch.tensor(used), num_splits=num_splits)
    expected = sdpa(*tensors, (-1, 0), used)[0]
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout))


def test_without_aux():
    assert isinstance(call(*inputs(), return_aux=AuxRequest()), torch.Tensor)


@pytest.mark.parametrize("name", ["varlen_attn", "varlen_attn_out"])
def test_every_argument_of_torch_is_accepted(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (fa_ops, varlen_of_torch))
    for argument, parameter in theirs.items():
        assert (ours[argument].kind, ours[argument].default) == (parameter.kind, parameter.default), argument
    assert list(ours)[: len(theirs)] == list(theirs)


def test_one_tensor_of_cumulative_lengths_is_two():
    q = torch.randn(9, 4, 16)
    k = torch.randn(12, 4, 16)  # three rows of padding behind the last sequence
    cu_seq = cumulative(LENGTHS_Q)
    found, expected = (fa_ops.varlen_attn(q, k, k, cu_seq, other, 5, 5) for other in (cu_seq, cu_seq.clone()))
    assert torch.equal(found, expected)


def call_out(out, q, k, v, **kwargs):
    return fa_ops.varlen_attn_out(out, q, k, v, cumulative(LENGTHS_Q), cumulative(LENGTHS_K), 5, 6, **kwargs)


@pytest.mark.parametrize("options", [{}, {"window_size": (-1, 0), "scale": 0.3, "seqused_k": torch.tensor([3, 2, 5])}])
@torch.no_grad()
def test_out_is_filled(options):
    tensors = inputs()
    expected = call(*tensors, **options, return_aux=AuxRequest(lse=True))
    out = torch.full_like(tensors[0], torch.nan)
    assert call_out(out, *tensors, **options) is out
    assert torch.equal(out, expected[0])
    found = call_out(out.zero_(), *tensors, **options, return_aux=AuxRequest(lse=True))
    assert found[0] is out
    assert torch.equal(out, expected[0])
    assert torch.equal(found[1], expected[1])
    assert isinstance(call_out(out, *tensors, **options, return_aux=AuxRequest()), torch.Tensor)


@torch.no_grad()
def test_out_of_any_strides_and_query_itself():
    q, k, v = inputs()
    expected = call(q, k, v)
    memory = torch.zeros(4, len(q), 20)
    call_out(memory.transpose(0, 1)[..., :16], q, k, v)
    assert torch.equal(memory[..., :16].transpose(0, 1), expected)
    assert not memory[..., 16:].any()
    call_out(q, q, k, v)
    assert torch.equal(q, expected)


def test_out_compiled(fresh_compiler):
    tensors = [t.detach() for t in inputs()]
    compiled = torch.compile(call_out, fullgraph=True, backend="aot_eager")
    out = torch.zeros_like(tensors[0])
    assert compiled(out, *tensors).data_ptr() == out.data_ptr()
    assert torch.equal(out, call(*tensors))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "out: shape (9, 4, 8) given; expected (total_q, Hq, Dv) = (9, 4, 16)", lambda q: q[..., :8]),
        (TypeError, "out: dtype torch.float16 given; expected query's, torch.float32", lambda q: q.half()),
        (ValueError, "out: device meta given; expected query's, cpu", lambda q: q.to("meta")),
        (TypeError, "out: NoneType given; accepted is a Tensor", lambda q: None),
    ],
)
def test_another_out_names_itself(error, message, make):
    q, k, v = (t.detach() for t in inputs())
    before = q.clone()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call_out(make(q), q, k, v)
    assert torch.equal(q, before)


@pytest.mark.parametrize("which", range(4))
def test_out_has_no_backward(which):
    q, k, v = (t.detach() for t in inputs())
    tensors = [torch.zeros_like(q), q, k, v]
    tensors[which].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^out: given where a gradient is asked for"):
        call_out(*tensors)
    with torch.no_grad():
        call_out(*tensors)
