"""Logits, losses and gradients against eager attention, under the accuracy rule."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.models.tiny import DEVICE, FAMILIES, PADDINGS, Batch, batch_of, cache_of, check_accuracy, tiny_model, twins
from tests.support.accuracy import AccuracyError


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of the tokens that are not padding, (tokens, vocabulary)."""
    with torch.no_grad():
        return model(batch.ids, attention_mask=batch.mask).logits[batch.is_token]


def loss_and_gradients(model: PreTrainedModel, batch: Batch, forward=None) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss = (model if forward is None else forward)(batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def check_training(model: PreTrainedModel, batch: Batch, forward=None) -> None:
    eager, exact = (loss_and_gradients(twin, batch) for twin in twins(model))
    ours = loss_and_gradients(model, batch, forward)
    assert ours.keys() == exact.keys()
    flat_ours, flat_exact, flat_eager = (torch.cat([t.flatten() for t in r.values()]) for r in (ours, exact, eager))
    assert flat_exact.abs().max() > 1e-2
    check_accuracy("gradients", flat_ours, flat_exact, flat_eager)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_tokens_equal_eager(family, padding):
    model, batch = tiny_model(family), batch_of(padding)
    eager, exact = (logits_of(twin, batch) for twin in twins(model))
    check_accuracy("logits", logits_of(model, batch), exact, eager)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_gradients_equal_eager(family, padding):
    check_training(tiny_model(family), batch_of(padding))


def test_the_checks_see_a_lost_mask():
    model, batch = tiny_model("llama"), batch_of("left")
    eager, exact = (logits_of(twin, batch) for twin in twins(model))
    without_mask = model(batch.ids).logits[batch.is_token].detach()
    with pytest.raises(AccuracyError, match="logits: max error"):
        check_accuracy("logits", without_mask, exact, eager)


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
    eager, exact = (logits_of(twin, batch) for twin in twins(model))
    check_accuracy("logits", logits_of(model, batch), exact, eager)
    causal = tiny_model("llama")
    assert not torch.allclose(logits_of(causal, batch), exact.float(), atol=1e-2)


def test_autocast_with_float32_weights():
    model, batch = tiny_model("qwen3"), batch_of("left")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = logits_of(model, batch)
        eager = logits_of(twins(model)[0], batch)
    check_accuracy("logits", ours, logits_of(twins(model)[1], batch), eager)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks(cache, padding):
    """Several queries behind keys of an earlier call, and before the room of a static cache."""
    batch = batch_of(padding)

    def logits_in_chunks(model):
        past, logits = cache_of(cache, model), []
        for chunk in (slice(0, 4), slice(4, 9), slice(9, 10), slice(10, 11)):
            mask = None if batch.mask is None else batch.mask[:, : chunk.stop]
            with torch.no_grad():
                output = model(batch.ids[:, chunk], attention_mask=mask, past_key_values=past)
            logits.append(output.logits)
        logits = torch.cat(logits, dim=1)
        # Queries before the first key see none; those of right padding see what came before them.
        return logits[batch.is_token.cumsum(-1) > 0]

    model = tiny_model("llama")
    eager, exact = (logits_in_chunks(twin) for twin in twins(model))
    check_accuracy("logits", logits_in_chunks(model), exact, eager)
