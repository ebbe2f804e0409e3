"""Generation beside the matrix: windows, assistants, holes, and a cache that nobody copies."""

import pytest
import torch

from fa_ops import cpu
from fa_ops.integrations import huggingface
from tests.models import support
from tests.models.checks import check_tokens, greedy
from tests.models.tiny import Batch, batch_of, cache_of, mixed_batch, tiny_model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_window_matters(cache):
    batch, options = batch_of("left"), {"cache_implementation": cache, "disable_compile": True}
    tokens = greedy(tiny_model("mistral", sliding_window=16), batch, **options)
    assert torch.equal(tokens, greedy(tiny_model("mistral", "eager", sliding_window=16), batch, **options))
    assert not torch.equal(tokens, greedy(tiny_model("mistral", "eager", sliding_window=64), batch, **options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", support.DECODERS)
def test_mixed_padding(family, cache):
    """Right padding leaves holes behind it, between the prompt and the new tokens."""
    options = {"cache_implementation": cache, "disable_compile": True}
    check_tokens(tiny_model(family), tiny_model(family, "eager"), mixed_batch(), **options)


@pytest.mark.parametrize("family", support.DECODERS)
def test_assisted_decoding(family):
    """Several queries at once over a cache that grows and shrinks."""
    batch = Batch(batch_of("none").ids[:1])
    check_tokens(
        tiny_model(family),
        tiny_model(family, "eager"),
        batch,
        assistant_model=tiny_model(family, num_hidden_layers=1, layer_types=["full_attention"]),
    )


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
