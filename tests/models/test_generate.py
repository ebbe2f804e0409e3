"""Greedy generation: the same tokens as eager attention, and a cache that nobody copies."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from fa_ops import cpu
from fa_ops.integrations import huggingface
from tests.models.tiny import FAMILIES, PADDINGS, WINDOWED, Batch, batch_of, cache_of, families_of, tiny_model

NEW_TOKENS = 32  # far beyond the windows of 8


def greedy(model, batch: Batch, **options) -> torch.Tensor:
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    tokens = model.generate(batch.ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert tokens.shape == (3, 11 + NEW_TOKENS)
    return tokens


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_eager(family, padding, cache):
    batch = batch_of(padding)
    expected = greedy(tiny_model(family, "eager"), batch)
    assert expected[:, 11:].unique().numel() > 5, "a model that repeats itself tests nothing"
    tokens = greedy(tiny_model(family), batch, cache_implementation=cache, disable_compile=True)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_window_matters(cache):
    batch, options = batch_of("left"), {"cache_implementation": cache, "disable_compile": True}
    tokens = greedy(tiny_model("mistral", sliding_window=16), batch, **options)
    assert torch.equal(tokens, greedy(tiny_model("mistral", "eager", sliding_window=16), batch, **options))
    assert not torch.equal(tokens, greedy(tiny_model("mistral", "eager", sliding_window=64), batch, **options))


def test_assisted_decoding():
    """Several queries at once over a cache that grows and shrinks."""
    model, assistant, batch = tiny_model("mistral"), tiny_model("mistral", num_hidden_layers=1), batch_of("none")
    batch = Batch(batch.ids[:1], None)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = model.generate(batch.ids, assistant_model=assistant, **options)
    assert torch.equal(tokens, tiny_model("mistral", "eager").generate(batch.ids, **options))


def check_compiled_decoding(family, backend):
    model, counter = tiny_model(family), CompileCounterWithBackend(backend)
    # generate() copies its configuration, a counter in it too, but not a function.
    compile_config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: counter(graph, inputs), mode=None)
    compile_config._compile_all_devices = True
    for padding in PADDINGS:
        batch = batch_of(padding)
        tokens = greedy(model, batch, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(tokens, greedy(tiny_model(family, "eager"), batch)), padding
    # One with a mask, one without; and Transformers counts a window's positions in an int, once constant, then not.
    assert 1 <= counter.frame_count <= (3 if family in WINDOWED else 2)


@pytest.mark.parametrize("family", families_of("llama", "mistral"))
def test_compiled_decoding(family, fresh_compiler):
    check_compiled_decoding(family, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_decoding_with_inductor(family, fresh_compiler):
    check_compiled_decoding(family, "inductor")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_keys_and_values_of_a_cache_are_not_copied(cache, monkeypatch):
    model, batch, seen = tiny_model("llama"), batch_of("left"), []

    def spy(q, k, v, *args, **kwargs):
        seen.append((k.data_ptr(), v.data_ptr(), k.stride(), v.stride()))
        return attention(q, k, v, *args, **kwargs)

    attention = huggingface.attention
    monkeypatch.setattr(huggingface, "attention", spy)
    past = cache_of(cache, model)
    for chunk in (slice(0, 10), slice(10, 11)):
        seen.clear()
        with torch.no_grad():
            model(batch.ids[:, chunk], attention_mask=batch.mask[:, : chunk.stop], past_key_values=past)
        expected = [
            (keys.data_ptr(), values.data_ptr(), keys.transpose(1, 2).stride(), values.transpose(1, 2).stride())
            for keys, values in ((layer.keys, layer.values) for layer in past.layers)
        ]
        assert seen == expected


@pytest.mark.slow
def test_inductor_copies_no_keys_and_values_either(monkeypatch, fresh_compiler):
    # On the CPU, where the op ends in a function that can be watched.
    model, batch, seen = tiny_model("llama").cpu(), batch_of("none").ids.cpu(), set()

    def spy(q, k, v, *args, **kwargs):
        seen.update((k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()))
        return flash_forward(q, k, v, *args, **kwargs)

    flash_forward = cpu.flash_forward
    past = cache_of("static", model)
    with torch.no_grad():
        model(batch[:, :10], past_key_values=past)
        monkeypatch.setattr(cpu, "flash_forward", spy)
        torch.compile(model, fullgraph=True)(batch[:, 10:], past_key_values=past)
    assert seen == {t.untyped_storage().data_ptr() for layer in past.layers for t in (layer.keys, layer.values)}
