"""fa_ops.varlen_attn: called as torch's varlen_attn, computed as fa_ops.attention."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import AuxRequest
from torch.nn.attention.varlen import varlen_attn as varlen_attn_of_torch

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


def test_every_argument_of_torch_is_accepted():
    ours, theirs = (inspect.signature(f).parameters for f in (fa_ops.varlen_attn, varlen_attn_of_torch))
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert list(ours)[: len(theirs)] == list(theirs)
