"""The mask function on its own: which keys it leaves, and in what form."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    padding_mask_function,
)

from fa_ops.integrations.huggingface_mask import triton_attention_mask


def mask(q_length, kv_length, padding=None, mask_function=causal_mask_function, **kwargs):
    padding = None if padding is None else torch.tensor(padding).bool()
    return triton_attention_mask(
        batch_size=2,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=padding,
        **kwargs,
    )


def rows(mask, channel=0):
    assert mask.dtype == torch.bool
    assert mask.shape[2] == 1
    return mask[:, channel, 0].int().tolist()


@pytest.mark.parametrize("mask_function", [causal_mask_function, bidirectional_mask_function])
@pytest.mark.parametrize(("q_length", "q_offset"), [(4, 0), (3, 1), (1, 3)])
def test_nothing_to_mask(mask_function, q_length, q_offset):
    assert mask(q_length, 4, mask_function=mask_function, q_offset=q_offset) is None


def test_padding_is_kept_as_it_is():
    padding = [[1, 1, 0, 1], [0, 0, 0, 0]]
    for q_length in (4, 2, 1):
        made = mask(q_length, 4, padding, q_offset=4 - q_length)
        assert made.shape == (2, 1, 1, 4)
        assert rows(made) == padding


@pytest.mark.parametrize("as_offset", [int, torch.tensor], ids=["int", "tensor"])
def test_room_of_a_static_cache(as_offset):
    decoding = mask(1, 6, [[0, 1, 1, 1], [1, 1, 0, 1]], q_offset=as_offset(3))
    assert decoding.shape == (2, 1, 1, 6)
    assert rows(decoding) == [[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]]

    chunk = mask(2, 6, [[0, 1, 1, 1], [1, 1, 1, 0]], q_offset=as_offset(2))
    assert chunk.shape == (2, 2, 1, 6)
    assert rows(chunk) == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert rows(chunk, channel=1) == [[1, 1, 1, 1, 0, 0]] * 2

    assert rows(mask(2, 6, q_offset=as_offset(2))) == [[1, 1, 1, 1, 0, 0]] * 2


def test_bidirectional_masks_hide_padding_alone():
    assert mask(2, 6, mask_function=bidirectional_mask_function) is None
    made = mask(2, 4, [[1, 1, 1, 0], [0, 1, 1, 1]], mask_function=bidirectional_mask_function)
    assert rows(made) == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_keys_behind_an_offset():
    made = mask(1, 3, [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], q_offset=4, kv_offset=2)
    assert rows(made) == [[0, 1, 1], [1, 1, 1]]


def test_padding_in_the_mask_function():
    inner = padding_mask_function(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool())
    made = mask(4, 4, [[0, 1, 1, 1], [0, 1, 1, 1]], mask_function=and_masks(causal_mask_function, inner))
    assert rows(made) == [[0, 1, 1, 0], [0, 1, 1, 1]]
