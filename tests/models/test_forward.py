"""Beside the matrix: prefill in chunks, mixed padding, autocast, rows of nothing, and positions of padding."""

import pytest
import torch

from tests.models import support
from tests.models.checks import (
    check_accuracy,
    check_logits,
    check_training,
    compiled,
    logits_in_chunks,
    logits_of,
    loss_and_gradients,
    twins,
)
from tests.models.tiny import DEVICE, LENGTH, PADDINGS, Batch, batch_of, cache_of, mixed_batch, tiny_model

SEVERAL_QUERIES = {
    "within the window": (slice(0, 4), slice(4, 7), slice(7, 8), slice(8, LENGTH)),
    "past the window": (slice(0, 9), slice(9, LENGTH)),
    "one first": (slice(0, 1), slice(1, LENGTH)),
}


@pytest.mark.parametrize("chunks", SEVERAL_QUERIES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", support.DECODERS)
def test_prefill_in_chunks(family, cache, padding, chunks):
    """Several queries behind keys of an earlier call, and before the room of a static cache."""
    model, batch = tiny_model(family), batch_of(padding)
    eager, exact = (logits_of(twin, batch, use_cache=False) for twin in twins(model))
    ours = logits_in_chunks(model, batch, cache, chunks=SEVERAL_QUERIES[chunks])
    check_accuracy("logits", ours, exact, eager)


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("family", support.DECODERS)
def test_mixed_padding(family, cache):
    check_logits(tiny_model(family), mixed_batch(), cache)


@pytest.mark.parametrize("family", [*support.DECODERS, *support.ENCODERS])
def test_gradients_with_mixed_padding(family):
    check_training(tiny_model(family), (mixed_batch(seed) for seed in range(1, 9)))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", support.FAMILIES)
def test_autocast(family, padding):
    """Weights in float32, attention in bfloat16, forward and backward."""
    model, batch = tiny_model(family), batch_of(padding, family)
    eager, exact = twins(model)
    expected = loss_and_gradients(exact, batch)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, eagers = (loss_and_gradients(m, batch) for m in (model, eager))
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    flat = (torch.cat([t.flatten() for t in results.values()]) for results in (ours, expected, eagers))
    check_accuracy("loss and gradients", *flat)


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_a_row_of_padding_alone_gives_no_nan(cache, is_training):
    model, batch = tiny_model("llama").train(is_training), batch_of("left")
    batch.mask[1] = 0
    past = None if cache == "none" else cache_of(cache, model)
    logits = model(batch.ids, attention_mask=batch.mask, past_key_values=past).logits
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("is_masked", [False, True], ids=["no mask", "mask"])
def test_is_causal_false_in_the_configuration_means_bidirectional(is_masked):
    model, batch = tiny_model("llama", is_causal=False), batch_of("left" if is_masked else "none")
    check_logits(model, batch)
    causal = logits_of(tiny_model("llama"), batch)
    assert not torch.allclose(logits_of(model, batch), causal, atol=1e-2)


@pytest.mark.parametrize("of_padding", [0, 1], ids=["positions 0", "positions 1"])
@pytest.mark.parametrize("mode", ["eval", "train", "no cache", "compiled"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_left_padded_positions_are_not_packed_documents(family, mode, of_padding, fresh_compiler):
    """They too restart. Without padding nothing else could tell them from documents."""
    model, batch = tiny_model(family, num_hidden_layers=1).train(mode == "train"), batch_of("left")
    positions = (batch.mask.cumsum(-1) - 1).masked_fill(batch.mask == 0, of_padding)
    forward = compiled(model)[0] if mode == "compiled" else None
    options = {"position_ids": positions, "use_cache": mode != "no cache"}
    ours = logits_of(model, batch, forward, **options)
    eager, exact = (logits_of(twin, batch, **options) for twin in twins(model))
    check_accuracy("logits", ours, exact, eager)
    for row, tokens in zip(batch.ids, batch.mask.sum(-1).tolist(), strict=True):
        alone = logits_of(model, Batch(row[None, -tokens:]))
        torch.testing.assert_close(ours[:tokens], alone)
        ours = ours[tokens:]
