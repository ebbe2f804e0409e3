"""What models do to a mask between the mask function and the attention function: the result is right, or it is refused.

Each change is made to our mask and to the whole mask that it stands for, and to queries, keys and values alike.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from fa_ops.integrations.huggingface import triton_attention_forward
from fa_ops.integrations.huggingface_mask import triton_attention_mask
from fa_ops.integrations.huggingface_pattern import PATTERNS
from tests.models.tiny import DEVICE, tiny_model

WINDOW = 3
BATCH, HEADS, DIM = 3, 2, 16
FUNCTIONS = {
    "causal": causal_mask_function,
    "bidirectional": bidirectional_mask_function,
    "sliding": sliding_window_causal_mask_function(WINDOW),
}
# (queries, keys, position of the first query)
SIZES = {"square": (6, 6, 0), "at the end": (3, 6, 3), "one query": (1, 6, 5), "room behind": (2, 8, 3)}
PADDINGS = {"padded": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1], [1] * 6], "full": None}


class Call:
    """Our mask, the whole mask (B, 1, Q, K) bool, and the tensors of a call that both belong to."""

    def __init__(self, kind: str, size: str, padding: str) -> None:
        generator = torch.Generator().manual_seed(0)
        q_length, kv_length, offset = SIZES[size]
        tokens = PADDINGS[padding]
        given = None if tokens is None else torch.tensor(tokens)[:, : offset + q_length].bool()
        self.config = MistralConfig(sliding_window=WINDOW)
        self.ours = _make(FUNCTIONS[kind], q_length, kv_length, offset, given, self.config)
        position = offset + torch.arange(q_length)[:, None]
        sees = FUNCTIONS[kind](0, 0, position, torch.arange(kv_length)[None])
        if not isinstance(sees, torch.Tensor):
            sees = torch.tensor(sees).expand(q_length, kv_length)
        self.whole = sees.expand(BATCH, 1, q_length, kv_length)
        if given is not None:
            self.whole = self.whole & F.pad(given, (0, kv_length - given.shape[1]))[:, None, None]
        self.q = torch.randn(BATCH, HEADS, q_length, DIM, generator=generator)
        self.k, self.v = (torch.randn(BATCH, HEADS, kv_length, DIM, generator=generator) for _ in "kv")

    def check(self, device: str = "cpu") -> str:
        """ "right" or "refused"; an AssertionError where the result is wrong. On a GPU a refusal of a copy is a failed
        assertion of the device, which ends the CUDA context of a process: there ask for what is right alone."""
        module = torch.nn.Module()
        module.config = self.config
        tensors = (t.to(device) for t in (self.q, self.k, self.v, self.ours))
        try:
            out, _ = triton_attention_forward(module, *tensors, scaling=0.5)
        except NotImplementedError:
            return "refused"
        sees = self.whole.any(-1, keepdim=True)
        expected = F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.whole | ~sees, scale=0.5)
        torch.testing.assert_close(out.cpu().transpose(1, 2) * sees, expected * sees)
        return "right"


def _make(mask_function, q_length, kv_length, offset, attention_mask, config):
    return triton_attention_mask(
        batch_size=BATCH, q_length=q_length, kv_length=kv_length, q_offset=offset, mask_function=mask_function,
        attention_mask=attention_mask, config=config,
    )  # fmt: skip


CALLS = [
    pytest.param(kind, size, padding, id=f"{kind}-{size}-{padding}")
    for kind in FUNCTIONS
    for size in SIZES
    for padding in PADDINGS
    if (kind, size) != ("bidirectional", "room behind")  # no model has it
]


def rows(call, change):
    call.ours = change(call.ours) if call.ours.shape[0] == BATCH else call.ours
    call.whole, call.q, call.k, call.v = map(change, (call.whole, call.q, call.k, call.v))


ROWS = {
    "sliced": lambda t: t[1:],
    "indexed": lambda t: t[torch.tensor([2, 0])],
    "chosen": lambda t: t[torch.tensor([True, False, True])],
    "repeated": lambda t: t.repeat_interleave(2, 0),
    "joined": lambda t: torch.cat([t, t[:1]]),
    "flipped": lambda t: t.flip(0),
}
COPIES = {
    "clone": torch.Tensor.clone,
    "contiguous": lambda t: t.clone().contiguous(),
    "deepcopy": copy.deepcopy,
    "view": lambda t: t[:],
    "saved": lambda t: _saved(t),
}


def _saved(mask):
    buffer = io.BytesIO()
    torch.save(mask, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_as_made(kind, size, padding):
    call = Call(kind, size, padding)
    assert call.check(DEVICE) == "right"


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_copied(kind, size, padding):
    for change in COPIES.values():
        call = Call(kind, size, padding)
        call.ours = change(call.ours)
        assert call.check(DEVICE) == "right"


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_other_rows(kind, size, padding):
    for change in ROWS.values():
        call = Call(kind, size, padding)
        rows(call, change)
        assert call.check(DEVICE) == "right"


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_the_last_query(kind, size, padding):
    call = Call(kind, size, padding)
    for name in ("ours", "whole", "q"):
        setattr(call, name, getattr(call, name)[:, :, -1:])
    assert call.check(DEVICE) == "right"


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_other_queries(kind, size, padding):
    for queries in (slice(0, 1), slice(0, 2), slice(-2, None), slice(1, 2), slice(2, 3), slice(0, 100)):
        call = Call(kind, size, padding)
        before = call.whole.shape
        for name in ("ours", "whole", "q"):
            setattr(call, name, getattr(call, name)[:, :, queries])
        if call.q.shape[2] and call.ours.shape[2]:
            assert call.check() == "right" or call.whole.shape != before


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_other_keys(kind, size, padding):
    for keys in (slice(1, None), slice(0, -1), slice(2, 5), slice(0, 100)):
        call = Call(kind, size, padding)
        before = call.whole.shape
        for name in ("ours", "whole"):
            setattr(call, name, getattr(call, name)[..., keys])
        call.k, call.v = call.k[:, :, keys], call.v[:, :, keys]
        if call.ours.shape[-1] and call.whole.any():
            assert call.check() == "right" or call.whole.shape != before


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_joined_along_the_keys(kind, size, padding):
    for times in (2, 3):
        call = Call(kind, size, padding)
        call.ours, call.whole = torch.cat([call.ours] * times, -1), torch.cat([call.whole] * times, -1)
        call.k, call.v = torch.cat([call.k] * times, 2), torch.cat([call.v] * times, 2)
        assert call.check() == "refused" or kind == "bidirectional"


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_another_number_of_heads(kind, size, padding):
    """Sliced, or expanded, so that the number of the pattern is another one."""
    for heads in range(1, len(PATTERNS) + 2):
        call = Call(kind, size, padding)
        number = call.ours.shape[1]
        call.ours = call.ours[:, :1].expand(-1, heads, -1, -1)
        assert call.check() == ("right" if heads == number else "refused")


@pytest.mark.parametrize(("kind", "size", "padding"), CALLS)
def test_written_into(kind, size, padding):
    call = Call(kind, size, padding)
    call.ours = call.ours.contiguous()
    assert call.check() == "right"
    call.ours[..., :1] = 1
    assert call.check() == "refused"


DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.float64)
SHAPES = (
    (BATCH, 1, 1, 6), (BATCH, HEADS, 1, 6), (1, 1, 1, 6), (BATCH, 2, 2, 6), (BATCH, 1, 2, 6), (1, 1, 1, 1),
    (1, 2, 1, 1), (BATCH, 1, 3, 6), (BATCH, 6),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_length", [1, 2, 6])
def test_masks_that_the_caller_made(dtype, q_length):
    module = tiny_model("llama").cpu().model.layers[0].self_attn
    query, key = torch.randn(BATCH, HEADS, q_length, DIM), torch.randn(BATCH, HEADS, 6, DIM)
    for mask in (
        make(shape).to(dtype) for shape in SHAPES for make in (torch.ones, torch.zeros, lambda s: torch.rand(s) > 0.5)
    ):
        with pytest.raises(NotImplementedError, match="attention_mask"):
            triton_attention_forward(module, query, key, key, mask)


def test_a_mask_that_did_not_come_back():
    model = tiny_model("llama")
    module, other = model.model.layers[0].self_attn, tiny_model("llama").model.layers[0].self_attn
    query, key = torch.randn(2, 4, 5, 16, device=DEVICE), torch.randn(2, 2, 5, 16, device=DEVICE)

    def make():
        return triton_attention_mask(
            batch_size=2, q_length=5, kv_length=5, mask_function=causal_mask_function, config=model.config,
            attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5], device=DEVICE).bool(), device=DEVICE,
        )  # fmt: skip

    mask = make()
    triton_attention_forward(other, query, key, key, None)  # of another model
    triton_attention_forward(module, query[:1], key[:1], key[:1], None)  # of another size
    with pytest.raises(NotImplementedError, match="None given, while the mask that was made for 2 rows of 5 queries"):
        triton_attention_forward(module, query, key, key, None)
    triton_attention_forward(module, query, key, key, mask)
    triton_attention_forward(module, query, key, key, None)  # it was read
    mask = make()
    del mask
    triton_attention_forward(module, query, key, key, None)  # nobody has it any more


@pytest.mark.parametrize(
    ("kind", "size", "padding", "backend"),
    [
        ("causal", "square", "padded", "aot_eager"),
        ("sliding", "at the end", "full", "aot_eager"),
        pytest.param("causal", "room behind", "padded", "inductor", marks=pytest.mark.slow),
    ],
)
def test_changed_in_compiled_code(kind, size, padding, backend, fresh_compiler):
    call = Call(kind, size, padding)
    module = torch.nn.Module()
    module.config = call.config

    def attend(change):
        def forward(q, k, v, mask):
            return triton_attention_forward(module, q, k, v, change(mask), scaling=0.5)[0]

        compiled = torch.compile(forward, fullgraph=True, backend=backend)
        mask = call.ours.clone()  # a copy: nothing but its elements says what it is
        return compiled(*(t.to(DEVICE) for t in (call.q, call.k, call.v, mask))).cpu()

    expected = triton_attention_forward(module, call.q, call.k, call.v, call.ours, scaling=0.5)[0]
    torch.testing.assert_close(attend(lambda mask: mask), expected)
    if DEVICE == "cpu":  # a failed assertion ends the CUDA context of a process
        with pytest.raises(NotImplementedError, match="not as the mask function made it"):
            attend(lambda mask: mask + (1 << 8))
