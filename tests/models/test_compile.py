"""torch.compile with fullgraph=True: one graph, for many lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.models.test_forward import check_training, logits_of
from tests.models.tiny import FAMILIES, PADDINGS, batch_of, check_accuracy, families_of, tiny_model, twins

LENGTHS = (11, 8, 13, 20, 31)


@pytest.mark.parametrize("family", families_of("llama", "mistral", "gpt_oss"))
def test_training(family, fresh_compiler):
    model, counter = tiny_model(family), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for padding in PADDINGS:
        check_training(model, batch_of(padding), forward)
    assert counter.frame_count == 2, "one with a mask, one without"


@pytest.mark.parametrize("family", families_of("qwen3", "gemma2"))
def test_forward(family, fresh_compiler):
    model, counter = tiny_model(family), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for padding in PADDINGS:
        batch = batch_of(padding)
        eager, exact = (logits_of(twin, batch) for twin in twins(model))
        check_accuracy("logits", logits_of(forward, batch), exact, eager)
    assert counter.frame_count == 2, "one with a mask, one without"


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_two_frames_for_five_lengths(padding, use_cache, fresh_compiler):
    model, counter = tiny_model("llama", num_hidden_layers=1).train(), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for length in LENGTHS:
        batch = batch_of(padding, length)
        forward(batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=use_cache).loss.backward()
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_inductor(family, fresh_compiler):
    model = tiny_model(family)
    forward = torch.compile(model, fullgraph=True)
    for padding in PADDINGS:
        check_training(model, batch_of(padding), forward)
