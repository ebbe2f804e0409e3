"""Encoders, and models of an encoder and a decoder: bidirectional windows, cross-attention."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from tests.models.test_forward import check_training, logits_of
from tests.models.tiny import (
    ENCODERS,
    PADDINGS,
    batch_of,
    check_accuracy,
    tiny_model,
    tiny_t5gemma,
    tiny_whisper,
    twins,
)
from tests.support.accuracy import AccuracyError

NEW_TOKENS = 32


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_logits_of_encoders_equal_eager(family, padding):
    model, batch = tiny_model(family), batch_of(padding)
    eager, exact = (logits_of(twin, batch) for twin in twins(model))
    check_accuracy("logits", logits_of(model, batch), exact, eager)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_training_gradients_of_encoders_equal_eager(family, padding):
    check_training(tiny_model(family), batch_of(padding))


@pytest.mark.parametrize("family", ENCODERS)
def test_compiled_encoders(family, fresh_compiler):
    model, counter = tiny_model(family), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for padding in PADDINGS:
        check_training(model, batch_of(padding), forward)
    assert 1 <= counter.frame_count <= 2


def test_the_checks_see_a_window_of_another_size():
    model, batch = tiny_model("modernbert"), batch_of("left")
    eager, exact = (logits_of(twin, batch) for twin in twins(model))
    model.config.sliding_window += 1
    for layer in model.model.layers:
        layer.attn.sliding_window = None
    with pytest.raises(AccuracyError, match="logits: max error"):
        check_accuracy("logits", logits_of(model, batch), exact, eager)


def seq2seq_inputs(family: str, padding: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of the encoder and of the decoder, and which of the decoder's are tokens."""
    batch = batch_of(padding)
    decoder = {"decoder_input_ids": batch.ids}
    if batch.mask is not None:
        decoder["decoder_attention_mask"] = batch.mask
    if family == "whisper":
        features = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0)).to(batch.ids.device)
        return {"input_features": features, **decoder}, batch.is_token
    other = batch_of(padding, 13)
    encoder = {"input_ids": other.ids}
    if other.mask is not None:
        encoder["attention_mask"] = other.mask
    return {**encoder, **decoder}, batch.is_token


SEQ2SEQ = {"t5gemma": tiny_t5gemma, "whisper": tiny_whisper}


def seq2seq_results(model, family, padding, forward=None) -> torch.Tensor:
    """Loss, and the gradients of all parameters."""
    inputs, is_token = seq2seq_inputs(family, padding)
    inputs = {n: t.to(next(model.parameters()).dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    model.zero_grad()
    logits = (model if forward is None else forward)(**inputs).logits[is_token]
    torch.nn.functional.cross_entropy(logits, inputs["decoder_input_ids"][is_token]).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat((logits.detach().flatten(), *gradients))


def check_seq2seq(model, family, padding, forward=None) -> None:
    eager, exact = (seq2seq_results(twin, family, padding) for twin in twins(model))
    check_accuracy("logits and gradients", seq2seq_results(model, family, padding, forward), exact, eager)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_and_decoder_equal_eager(family, padding):
    check_seq2seq(SEQ2SEQ[family](), family, padding)


@pytest.mark.slow
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_compiled_encoder_and_decoder(family, fresh_compiler):
    model, counter = SEQ2SEQ[family](), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for padding in PADDINGS:
        check_seq2seq(model, family, padding, forward)
    assert 1 <= counter.frame_count <= 2


def greedy(model, family, padding, **options) -> torch.Tensor:
    inputs, _ = seq2seq_inputs(family, padding)
    encoder = {name: t for name, t in inputs.items() if not name.startswith("decoder")}
    start = inputs["decoder_input_ids"][:, :1]
    return model.generate(**encoder, decoder_input_ids=start, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_greedy_tokens_equal_eager(family, padding, cache):
    expected = greedy(SEQ2SEQ[family]("eager"), family, padding)
    assert expected.shape[1] >= NEW_TOKENS
    assert expected.unique().numel() > 5, "a model that repeats itself tests nothing"
    options = {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(greedy(SEQ2SEQ[family](), family, padding, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_compiled_decoding(family, fresh_compiler):
    model, counter = SEQ2SEQ[family](), CompileCounterWithBackend("aot_eager")
    compile_config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: counter(graph, inputs), mode=None)
    compile_config._compile_all_devices = True
    for padding in PADDINGS:
        tokens = greedy(model, family, padding, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(tokens, greedy(SEQ2SEQ[family]("eager"), family, padding))
    assert counter.frame_count >= 1
