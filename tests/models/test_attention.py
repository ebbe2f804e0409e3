"""The attention function on its own: alignment, cross-attention, and no wait for the device."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from fa_ops.integrations.huggingface import triton_attention_forward
from fa_ops.integrations.huggingface_mask import triton_attention_mask
from tests.models.tiny import DEVICE


def attend(q_length, kv_length, padding=None, q_offset=0, is_causal=True, device=DEVICE, is_training=False):
    """Output of 4 query heads on 2 key heads and the (B, Q, Hq, Dv) of SDPA with the whole mask (None on fakes)."""
    query = torch.randn(2, 4, q_length, 16, device=device)
    key, value = (torch.randn(2, 2, kv_length, 16, device=device) for _ in range(2))
    if padding is not None:
        padding = torch.tensor(padding, device=device).bool()
    mask = triton_attention_mask(
        batch_size=2,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        mask_function=causal_mask_function if is_causal else bidirectional_mask_function,
        attention_mask=padding,
        device=device,
    )
    module = torch.nn.Module().train(is_training)
    positions = q_offset + torch.arange(q_length, device=device)[None]
    out, weights = triton_attention_forward(
        module, query, key, value, mask, scaling=0.3, is_causal=is_causal, position_ids=positions
    )
    assert weights is None
    assert out.is_contiguous()
    sees = torch.ones(2, 1, q_length, kv_length, dtype=torch.bool, device=device)
    if padding is not None:
        sees = sees & F.pad(padding, (0, kv_length - padding.shape[1]))[:, None, None, :]
    if is_causal:
        sees = sees & (torch.arange(kv_length, device=device) <= positions[0, :, None])
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=0.3, enable_gqa=True)
    return out, expected.transpose(1, 2)


@pytest.mark.parametrize("is_tensor", [False, True], ids=["int offset", "tensor offset"])
@pytest.mark.parametrize(
    ("q_length", "q_offset", "kv_length"),
    [(5, 0, 5), (2, 3, 5), (1, 4, 5), (5, 0, 8), (2, 3, 8), (1, 4, 8), (1, 0, 8), (1, 0, 1)],
)
@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1], [1] * 5], [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]])
def test_causal(padding, q_length, q_offset, kv_length, is_tensor):
    if padding is not None:
        padding = [row[: q_offset + q_length] for row in padding]
    if is_tensor and q_length + q_offset == kv_length and q_offset:
        q_offset = torch.tensor(q_offset, device=DEVICE)
    torch.testing.assert_close(*attend(q_length, kv_length, padding, q_offset))


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]], ids=["no padding", "padding"])
@pytest.mark.parametrize("q_length", [5, 3, 1, 7])
def test_cross_attention(q_length, padding, is_training):
    torch.testing.assert_close(*attend(q_length, 5, padding, is_causal=False, is_training=is_training))


def test_right_padding_is_left_out_in_training():
    out, expected = attend(4, 4, [[1, 1, 0, 0], [0, 1, 1, 0]], is_training=True)
    is_token = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], device=DEVICE).bool()
    torch.testing.assert_close(out[is_token], expected[is_token])
    assert (out[~is_token] == 0).all()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]], ids=["no padding", "padding"])
@pytest.mark.parametrize(("q_length", "kv_length"), [(5, 5), (2, 5), (1, 5), (2, 8), (1, 8)])
def test_reads_nothing_back_from_the_device(q_length, kv_length, padding, is_causal):
    with FakeTensorMode():  # has no values: whatever asks for one raises
        offset = torch.zeros((), dtype=torch.int64) if kv_length == 8 else 5 - q_length
        out, _ = attend(q_length, kv_length, padding, offset, is_causal, device="cpu")
    assert out.shape == (2, q_length, 4, 16)


@pytest.mark.parametrize("form", ["positions", "cumulative lengths"])
def test_reads_nothing_of_packed_sequences_back_from_the_device(form):
    with FakeTensorMode():
        query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
        lengths = torch.tensor([0, 4, 9])
        packing = {"position_ids": torch.arange(9)[None]}
        if form == "cumulative lengths":
            packing = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
        out, _ = triton_attention_forward(torch.nn.Module(), query, key, key, None, is_causal=True, **packing)
    assert out.shape == (1, 9, 4, 16)


def test_a_fake_tensor_has_no_value():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]], ids=["no padding", "padding"])
def test_waits_for_nothing_on_a_gpu(padding):
    padding = None if padding is None else torch.tensor(padding, device=DEVICE)
    query = torch.randn(2, 4, 2, 16, device=DEVICE)
    key = torch.randn(2, 2, 8, 16, device=DEVICE)
    offset, positions = torch.tensor(3, device=DEVICE), torch.arange(3, 5, device=DEVICE)[None]

    def run():
        mask = triton_attention_mask(
            batch_size=2,
            q_length=2,
            kv_length=8,
            q_offset=offset,
            mask_function=causal_mask_function,
            attention_mask=padding,
            device=DEVICE,
        )
        for attention_mask in (mask, None):
            triton_attention_forward(
                torch.nn.Module(), query, key, key, attention_mask, is_causal=True, position_ids=positions
            )
        packed = torch.arange(2, device=DEVICE)[None]
        triton_attention_forward(
            torch.nn.Module(), query[:1], query[:1], query[:1], None, is_causal=True, position_ids=packed
        )

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
