"""The oracle against finite differences, against torch's own attention, and against the contract's edges."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fa_ops.reference import attention_reference, visible

LENS = [
    pytest.param((3, 5), None, id="shared"),
    pytest.param((2, 4), (5, 4), id="more_keys"),
    pytest.param((5, 3), (2, 1), id="more_queries"),
    pytest.param((0, 4, 2), (3, 0, 2), id="empty"),
]


def _starts(lens: tuple[int, ...], gap: int) -> Tensor:
    return torch.tensor([sum(lens[:i]) + gap * (i + 1) for i in range(len(lens))])


def _packed(lens_q: tuple[int, ...], lens_k: tuple[int, ...] | None, heads: tuple[int, int], dims: tuple[int, int]):
    """float64 q, k, v with a row outside of every sequence between them all, and the metadata."""
    metadata = {"b_start_loc": _starts(lens_q, 1), "b_seq_len": torch.tensor(lens_q)}
    if lens_k is not None:
        metadata |= {"b_start_loc_k": _starts(lens_k, 1), "b_seq_len_k": torch.tensor(lens_k)}
    rows_q, rows_k = (sum(lens) + len(lens) + 1 for lens in (lens_q, lens_k or lens_q))
    shapes = (rows_q, heads[0], dims[0]), (rows_k, heads[1], dims[0]), (rows_k, heads[1], dims[1])
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes], metadata


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("lens_q", "lens_k"), LENS)
@pytest.mark.parametrize("reorder_ops", [False, True], ids=["", "reordered"])
def test_gradcheck(lens_q, lens_k, is_causal, reorder_ops):
    """Through out, and through lse where it is finite."""
    qkv, metadata = _packed(lens_q, lens_k, heads=(4, 2), dims=(3, 2))

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(
            q, k, v, **metadata, is_causal=is_causal, return_lse=True, reorder_ops=reorder_ops
        )
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in qkv])


@pytest.mark.parametrize("reorder_ops", [False, True], ids=["", "reordered"])
@pytest.mark.parametrize(
    ("features", "has_sinks"),
    [
        ({"window_size": (1, 1)}, False),
        ({"softcap": 1.5}, False),
        ({}, True),
        ({"window_size": (0, -1), "softcap": 2.0}, True),
    ],
    ids=["window", "softcap", "sinks", "all"],
)
def test_gradcheck_features(features, has_sinks, reorder_ops):
    """Windows, softcap and sinks, with queries that see no key among them."""
    qkv, metadata = _packed((4, 3), (2, 5), heads=(4, 2), dims=(3, 2))
    leaves = [*qkv, torch.randn(4, dtype=torch.float64)] if has_sinks else qkv

    def outputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(
            q, k, v, **metadata, **features, sinks=sinks, return_lse=True, reorder_ops=reorder_ops
        )
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in leaves])


def test_features_by_hand():
    """One query of one head, each feature written out."""
    q, k = torch.tensor([[[2.0] + [0.0] * 15]]), torch.zeros(3, 1, 16)
    k[:, 0, 0] = torch.tensor([0.5, 1.0, 1.5])
    v = torch.eye(16)[:3, None]
    metadata = {"b_start_loc": torch.tensor([0]), "b_seq_len": torch.tensor([1])}
    metadata |= {"b_start_loc_k": torch.tensor([0]), "b_seq_len_k": torch.tensor([3])}
    call = functools.partial(attention_reference, q, k, v, **metadata, softmax_scale=1.0, return_lse=True)
    capped = 1.5 * torch.tanh(torch.tensor([1.0, 2.0, 3.0]) / 1.5)
    for options, scores in (
        ({}, [1.0, 2.0, 3.0]),
        ({"window_size": (1, -1)}, [-torch.inf, 2.0, 3.0]),
        ({"softcap": 1.5}, capped.tolist()),
    ):
        scores = torch.tensor(scores)
        out, lse = call(**options)
        torch.testing.assert_close(out[0, 0, :3], scores.softmax(0))
        torch.testing.assert_close(lse[0, 0], scores.logsumexp(0))
        with_sink = torch.cat([scores, torch.tensor([0.7])])
        out, lse = call(**options, sinks=torch.tensor([0.7]))
        torch.testing.assert_close(out[0, 0, :3], with_sink.softmax(0)[:3])
        torch.testing.assert_close(lse[0, 0], with_sink.logsumexp(0))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("placement", ["left", "right"])
def test_gradcheck_padded_with_key_mask(placement, is_causal):
    lens = torch.tensor((4, 2, 5))
    starts = 5 - lens if placement == "left" else torch.zeros_like(lens)
    key_mask = torch.rand(3, 5) < 0.7
    qkv = [torch.randn(3, 5, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(q, k, v, starts, lens, None, is_causal, key_mask=key_mask, return_lse=True)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(outputs, qkv)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("lens_q", "lens_k"), LENS)
@pytest.mark.parametrize("reorder_ops", [False, True], ids=["", "reordered"])
def test_against_sdpa(lens_q, lens_k, is_causal, reorder_ops):
    """Sequence by sequence, with a mask written by hand, in float64; gradients too."""
    qkv, metadata = _packed(lens_q, lens_k, heads=(6, 2), dims=(16, 8))
    leaves = [t.requires_grad_() for t in qkv]
    out = attention_reference(*leaves, **metadata, is_causal=is_causal, reorder_ops=reorder_ops)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)

    expected_out = torch.zeros_like(out)
    expected_grads = [torch.zeros_like(t) for t in leaves]
    starts_k = metadata.get("b_start_loc_k", metadata["b_start_loc"])
    for start_q, start_k, n, m in zip(metadata["b_start_loc"], starts_k, lens_q, lens_k or lens_q, strict=True):
        rows, keys = slice(start_q, start_q + n), slice(start_k, start_k + m)
        mask = torch.tensor([[not is_causal or j - i <= m - n for j in range(m)] for i in range(n)]).view(n, m)
        seen = [i for i in range(n) if mask[i].any()]
        if not seen:
            continue
        own = [qkv[0][rows], qkv[1][keys], qkv[2][keys]]
        own = [t.detach().clone().requires_grad_() for t in own]
        attended = F.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (own[0][seen], *own[1:])), attn_mask=mask[seen], enable_gqa=True
        )[0].transpose(0, 1)
        absolute = [int(start_q) + i for i in seen]
        expected_out[absolute] = attended.detach()
        for total, at, grad in zip(
            expected_grads, (rows, keys, keys), torch.autograd.grad(attended, own, dout[absolute]), strict=True
        ):
            total[at] = grad
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-13)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_lse_is_the_logarithm_of_the_denominator():
    q, k = torch.randn(4, 1, 16, dtype=torch.float64), torch.randn(4, 1, 16, dtype=torch.float64)
    _, lse = attention_reference(q, k, k, torch.tensor([0]), torch.tensor([4]), softmax_scale=0.5, return_lse=True)
    scores = (0.5 * q[:, 0] @ k[:, 0].T).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse[0], scores.exp().sum(1).log())


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_what_is_not_seen_has_no_influence(is_padded):
    """NaN in rows of no sequence, in masked keys, and in the gradients of rows that see nothing."""
    starts, lens_q, lens_k = torch.tensor([1]), torch.tensor([5]), torch.tensor([3])
    shapes = [(8, 2, 16), (7, 1, 16), (7, 1, 16)]
    q, k, v = (torch.full((1, *shape) if is_padded else shape, torch.nan) for shape in shapes)
    key_mask = None
    for t, rows in ((q, slice(1, 6)), (k, slice(1, 4)), (v, slice(1, 4))):
        (t[0] if is_padded else t)[rows] = 1.0
    if is_padded:
        key_mask = torch.ones(1, 7, dtype=torch.bool)
        key_mask[0, 2] = False
        k[0, 2] = v[0, 2] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention_reference(
        *leaves, starts, lens_q, b_start_loc_k=starts, b_seq_len_k=lens_k, key_mask=key_mask, return_lse=True
    )
    blind = torch.ones(8, dtype=torch.bool)
    blind[3:6] = False  # of the five queries, the last three see a key
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    (dout[0] if is_padded else dout)[blind] = torch.nan
    dlse[..., blind] = torch.nan
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    out, dq, dk, dv = (t[0] if is_padded else t for t in (out, dq, dk, dv))
    assert torch.equal(out, torch.where(blind, 0.0, 1.0)[:, None, None].expand_as(out))
    assert (lse[..., blind] == -torch.inf).all()
    assert lse[..., ~blind].isfinite().all()
    for grad in (dq, dk, dv):
        assert grad.isfinite().all()
    assert not dq[blind].any()
    outside = [0, 2, 4, 5, 6] if is_padded else [0, 4, 5, 6]
    assert not dk[outside].any()
    assert not dv[outside].any()


@pytest.mark.parametrize("shape", [(0,), (4,), (0, 5), (2, 0), (2, 5)], ids=str)
def test_no_rows_at_all(shape):
    """No sequence, or only empty ones: still part of autograd's graph, with gradients of 0."""
    num_seqs = shape[0] if len(shape) == 2 else 2
    starts = lens = torch.zeros(num_seqs, dtype=torch.int32)
    q, k, v = (torch.randn(*shape, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    out, lse = attention_reference(q, k, v, starts, lens, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (*shape[:-1], 4, shape[-1])
    for grad in torch.autograd.grad((out, lse), (q, k, v), (out, lse)):
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_rounding(dtype):
    """Upcast, the result is float64's, rounded once."""
    qkv = [torch.randn(6, 2, 16).to(dtype) for _ in range(3)]
    one_sequence = {"b_start_loc": torch.tensor([0]), "b_seq_len": torch.tensor([6])}
    call = functools.partial(attention_reference, **one_sequence, return_lse=True)
    out, lse = call(*qkv)
    exact_out, exact_lse = call(*(t.double() for t in qkv))
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, exact_out.to(dtype))
    assert torch.equal(lse, exact_lse.to(lse.dtype))


def test_reordered_operations_round_elsewhere():
    qkv = [torch.randn(40, 2, 32) for _ in range(3)]
    call = functools.partial(attention_reference, *qkv, torch.tensor([0]), torch.tensor([40]), upcast=False)
    plain, reordered = call(), call(reorder_ops=True)
    assert not torch.equal(plain, reordered)
    torch.testing.assert_close(plain, reordered)


def test_visible_is_aligned_bottom_right():
    cpu = torch.device("cpu")
    assert visible(2, 4, True, None, cpu).tolist() == [[True, True, True, False], [True] * 4]
    assert visible(3, 1, True, None, cpu).tolist() == [[False], [False], [True]]
    assert visible(1, 3, False, torch.tensor([True, False, True]), cpu).tolist() == [[True, False, True]]
