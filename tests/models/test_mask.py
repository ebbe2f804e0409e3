"""The mask function on its own: which keys it leaves, and in what form."""

from typing import NamedTuple

import pytest
import torch
from transformers import MistralConfig
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

from fa_ops.integrations.huggingface_mask import triton_attention_mask
from fa_ops.integrations.huggingface_pattern import (
    CENTRED,
    NO_WINDOW,
    PATTERNS,
    SLIDING,
    MaskPattern,
    pattern_of,
    read_mask,
)

HIDES = MaskPattern(is_causal=True, hides_keys=True)


class Read(NamedTuple):
    """A mask as the attention function reads it, from its elements alone."""

    pattern: MaskPattern
    visible: list | None
    written: list | None


def mask(q_length, kv_length, padding=None, mask_function=causal_mask_function, **kwargs):
    padding = None if padding is None else torch.tensor(padding).bool()
    made = triton_attention_mask(
        batch_size=2,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=padding,
        **kwargs,
    )
    if made is None:
        return None
    pattern = pattern_of(made, 2, kv_length)
    known, read = (read_mask(m, pattern, q_length, kv_length) for m in (made, made.clone()))
    for own, other in zip(known, read, strict=True):
        assert own is None or torch.equal(own, other), "what is left on the tensor is what its elements say"
    return Read(pattern, *(None if state is None else state.int().tolist() for state in read))


@pytest.mark.parametrize(("q_length", "q_offset"), [(4, 0), (3, 1), (1, 3)])
def test_nothing_to_mask(q_length, q_offset):
    assert mask(q_length, 4, q_offset=q_offset) == Read(MaskPattern(is_causal=True), None, None)
    arguments = {"mask_function": bidirectional_mask_function, "q_offset": q_offset}
    assert mask(q_length, 4, **arguments) == Read(MaskPattern(is_causal=False), None, None)
    assert mask(q_length, 4, **arguments, allow_is_bidirectional_skip=False) is not None
    assert mask(q_length, 4, **arguments, allow_is_bidirectional_skip=True) is None


def test_causal_is_never_none():
    """Not all models take None for causal attention."""
    assert mask(4, 4, allow_is_causal_skip=True, allow_is_bidirectional_skip=True) is not None


def test_padding_is_kept_as_it_is():
    padding = [[1, 1, 0, 1], [0, 0, 0, 0]]
    for q_length in (4, 2, 1):
        made = mask(q_length, 4, padding, q_offset=4 - q_length)
        assert made[:2] == (HIDES, padding)


@pytest.mark.parametrize("as_offset", [int, torch.tensor], ids=["int", "tensor"])
def test_room_of_a_static_cache(as_offset):
    decoding = mask(1, 6, [[0, 1, 1, 1], [1, 1, 0, 1]], q_offset=as_offset(3))
    assert decoding == Read(HIDES, [[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]], [[1, 1, 1, 1, 0, 0]] * 2)

    chunk = mask(2, 6, [[0, 1, 1, 1], [1, 1, 1, 0]], q_offset=as_offset(2))
    assert chunk == Read(HIDES, [[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0, 0]] * 2)

    assert mask(2, 6, q_offset=as_offset(2)).visible == [[1, 1, 1, 1, 0, 0]] * 2


def test_bidirectional_masks_hide_padding_alone():
    made = mask(2, 4, [[1, 1, 1, 0], [0, 1, 1, 1]], mask_function=bidirectional_mask_function)
    assert made[:2] == (MaskPattern(is_causal=False, hides_keys=True), [[1, 1, 1, 0], [0, 1, 1, 1]])


def test_keys_behind_an_offset():
    made = mask(1, 3, [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], q_offset=4, kv_offset=2)
    assert made.visible == [[0, 1, 1], [1, 1, 1]]


def test_padding_in_the_mask_function():
    inner = padding_mask_function(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool())
    made = mask(4, 4, [[0, 1, 1, 1], [0, 1, 1, 1]], mask_function=and_masks(causal_mask_function, inner))
    assert made.visible == [[0, 1, 1, 0], [0, 1, 1, 1]]


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
    made = mask(9, 9, mask_function=of_size(size), config=MistralConfig(sliding_window=size))
    assert made == Read(pattern, None, None)
    left, right = pattern.window_size(size)
    query, key = torch.arange(9)[:, None], torch.arange(9)[None]
    expected = of_size(size)(0, 0, query, key)
    assert torch.equal((key - query >= -left) & (key - query <= right), expected)


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_with_padding(kind):
    of_size, pattern = WINDOWS[kind]
    padding = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    made = mask(5, 5, padding, mask_function=of_size(3), config=MistralConfig(sliding_window=3))
    assert made[:2] == (pattern._replace(hides_keys=True), padding)


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_with_room_for_every_key_is_none(kind):
    assert mask(5, 5, mask_function=WINDOWS[kind][0](5)).pattern.window == NO_WINDOW


def test_every_pattern_has_a_number_of_its_own():
    assert sorted(pattern.number for pattern in PATTERNS) == list(range(1, len(PATTERNS) + 1))
    for pattern in PATTERNS:
        shape = (2, pattern.number, 1, 7) if pattern.has_keys else (1, pattern.number, 1, 1)
        assert pattern_of(torch.empty(shape, dtype=torch.int64), 2, 7) == pattern


def test_packed_sequences_are_marked_where_they_begin():
    packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]))
    made = mask(5, 5, mask_function=and_masks(causal_mask_function, packed))
    assert made[:2] == (MaskPattern(is_causal=True, is_packed=True), [[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]])


@pytest.mark.usefixtures("fresh_compiler")
def test_pattern_is_constant_under_dynamic_shapes():
    """A model that was compiled for several kinds of masks gets their sizes as symbols."""

    def read(mask: torch.Tensor) -> tuple:
        return mask.sum(), *pattern_of(mask, 2, 5)

    compiled = torch.compile(read, backend="eager", fullgraph=True, dynamic=True)
    for pattern in PATTERNS[:6]:
        _, *found = compiled(torch.ones(2, pattern.number, 1, 5, dtype=torch.int64))
        assert MaskPattern(*found) == pattern
        assert type(found[0]) is bool
