"""The mask function on its own: which keys it leaves, and in what form."""

import types

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

from fa_ops.integrations.huggingface_mask import (
    CENTRED,
    NO_WINDOW,
    NUM_PATTERNS,
    PATTERNS,
    SLIDING,
    MaskPattern,
    triton_attention_mask,
)

CAUSAL = MaskPattern(is_causal=True).number


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
    assert (mask == mask[:, :1]).all(), "the number of patterns only counts"
    return mask[:, 0, channel].int().tolist()


@pytest.mark.parametrize("mask_function", [causal_mask_function, bidirectional_mask_function])
@pytest.mark.parametrize(("q_length", "q_offset"), [(4, 0), (3, 1), (1, 3)])
def test_nothing_to_mask(mask_function, q_length, q_offset):
    assert mask(q_length, 4, mask_function=mask_function, q_offset=q_offset) is None


def test_padding_is_kept_as_it_is():
    padding = [[1, 1, 0, 1], [0, 0, 0, 0]]
    for q_length in (4, 2, 1):
        made = mask(q_length, 4, padding, q_offset=4 - q_length)
        assert made.shape == (2, CAUSAL, 1, 4)
        assert rows(made) == padding


@pytest.mark.parametrize("as_offset", [int, torch.tensor], ids=["int", "tensor"])
def test_room_of_a_static_cache(as_offset):
    decoding = mask(1, 6, [[0, 1, 1, 1], [1, 1, 0, 1]], q_offset=as_offset(3))
    assert decoding.shape == (2, CAUSAL, 1, 6)
    assert rows(decoding) == [[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]]

    chunk = mask(2, 6, [[0, 1, 1, 1], [1, 1, 1, 0]], q_offset=as_offset(2))
    assert chunk.shape == (2, CAUSAL, 2, 6)
    assert rows(chunk) == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert rows(chunk, channel=1) == [[1, 1, 1, 1, 0, 0]] * 2

    assert rows(mask(2, 6, q_offset=as_offset(2))) == [[1, 1, 1, 1, 0, 0]] * 2


def test_bidirectional_masks_hide_padding_alone():
    assert mask(2, 6, mask_function=bidirectional_mask_function) is None
    made = mask(2, 4, [[1, 1, 1, 0], [0, 1, 1, 1]], mask_function=bidirectional_mask_function)
    assert made.shape == (2, 1, 1, 4)
    assert rows(made) == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_keys_behind_an_offset():
    made = mask(1, 3, [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], q_offset=4, kv_offset=2)
    assert rows(made) == [[0, 1, 1], [1, 1, 1]]


def test_padding_in_the_mask_function():
    inner = padding_mask_function(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool())
    made = mask(4, 4, [[0, 1, 1, 1], [0, 1, 1, 1]], mask_function=and_masks(causal_mask_function, inner))
    assert rows(made) == [[0, 1, 1, 0], [0, 1, 1, 1]]


WINDOWS = {
    "causal": (sliding_window_causal_mask_function, MaskPattern(True, SLIDING)),
    "bidirectional": (sliding_window_bidirectional_mask_function, MaskPattern(False, SLIDING)),
    "of T5Gemma-2's encoder": (
        lambda size: and_masks(bidirectional_mask_function, sliding_window_mask_function(size, is_causal=False)),
        MaskPattern(False, CENTRED),
    ),
}


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_what_their_functions_say(kind, size):
    of_size, pattern = WINDOWS[kind]
    config = types.SimpleNamespace(sliding_window=size)
    made = mask(9, 9, mask_function=of_size(size), config=config)
    assert made.shape == (1, pattern.number, 1, 1)
    assert MaskPattern.of(made) == pattern
    left, right = pattern.window_size(size)
    query, key = torch.arange(9)[:, None], torch.arange(9)[None]
    expected = of_size(size)(0, 0, query, key)
    assert torch.equal((key - query >= -left) & (key - query <= right), expected)


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_with_padding(kind):
    of_size, pattern = WINDOWS[kind]
    padding = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    made = mask(5, 5, padding, mask_function=of_size(3), config=types.SimpleNamespace(sliding_window=3))
    assert made.shape == (2, pattern.number, 1, 5)
    assert rows(made) == padding


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_with_room_for_every_key_is_none(kind):
    assert mask(5, 5, mask_function=WINDOWS[kind][0](5)) is None


def test_every_pattern_has_a_number_of_its_own():
    patterns = [
        MaskPattern(is_causal, window, is_packed)
        for is_causal in (False, True)
        for window in (NO_WINDOW, SLIDING, CENTRED)
        for is_packed in (False, True)
    ]
    assert sorted(pattern.number for pattern in patterns) == list(range(1, NUM_PATTERNS + 1))
    assert [MaskPattern.of(torch.empty(1, pattern.number, 1, 1)) for pattern in patterns] == patterns


def test_packed_sequences_are_marked_where_they_begin():
    packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]))
    made = mask(5, 5, mask_function=and_masks(causal_mask_function, packed))
    assert MaskPattern.of(made) == MaskPattern(is_causal=True, is_packed=True)
    assert rows(made) == [[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.usefixtures("fresh_compiler")
def test_pattern_is_constant_under_dynamic_shapes():
    """A model that was compiled for several kinds of masks gets their sizes as symbols."""

    def read(mask: torch.Tensor) -> tuple:
        return mask.sum(), *MaskPattern.of(mask)

    compiled = torch.compile(read, backend="eager", fullgraph=True, dynamic=True)
    for number, pattern in list(PATTERNS.items())[::2]:
        _, *found = compiled(torch.ones(2, number, 1, 5, dtype=torch.bool))
        assert MaskPattern(*found) == pattern
        assert type(found[0]) is bool
