"""No size is frozen: one exported program and at most two compiled graphs serve lengths on both sides of a window."""

import pytest
import torch

from tests.models.checks import check_accuracy, compiled, inputs_of, logits_of, twins
from tests.models.tiny import WINDOW, Batch, batch_of, tiny_model

LENGTHS = (2, 5, WINDOW, WINDOW + 1, 11, 20, 31)
FAMILIES = ("llama", "mistral", "gemma3", "modernbert")

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def check(model, batch: Batch, forward) -> None:
    eager, exact = (logits_of(twin, batch) for twin in twins(model))
    check_accuracy(f"logits of {batch.ids.shape[1]}", logits_of(model, batch, forward), exact, eager)


def cells(*quick: str) -> list:
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in FAMILIES]


@pytest.mark.parametrize("padding", ["none", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", cells("mistral"))
def test_one_exported_program_serves_all_lengths(family, padding):
    model = tiny_model(family, num_hidden_layers=2)
    length = torch.export.Dim("length", min=2, max=64)
    inputs = inputs_of(model, batch_of(padding, length=13))
    dynamic = {name: {1: length} for name in inputs}
    model.config.use_cache = False
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic).module()
    for other in LENGTHS if padding == "none" else LENGTHS[3:]:
        check(model, batch_of(padding, length=other), program)


@pytest.mark.parametrize("family", cells())
def test_two_frames_for_lengths_on_both_sides_of_the_window(family):
    model = tiny_model(family, num_hidden_layers=2)
    model.config.use_cache = False
    forward, counter = compiled(model)
    for length in (*LENGTHS[1:], *LENGTHS[1:4]):
        check(model, batch_of("none", length=length), forward)
    assert 1 <= counter.frame_count <= 2
