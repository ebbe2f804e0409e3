"""The support matrix: every family of models with every feature that it has, against eager attention.

A cell of the grid is a family with a kind of cache and of padding, compiled or not.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.models import support
from tests.models.checks import (
    check_logits,
    check_tokens,
    check_training,
    compiled,
    compiled_decoding,
    logits_of,
    loss_and_gradients,
    loss_of,
    twins,
)
from tests.models.packing import FORMS, check_packed
from tests.models.tiny import PADDINGS, Batch, batch_of, tiny_model
from tests.support.accuracy import AccuracyError, ErrorPool

README = Path(__file__).parents[2] / "README.md"
STEPS = 30
DRAWS = 8
CURVE_TOLERANCE = 1e-3

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def check_cell(family: str, cache: str | None, padding: str, backend: str | None) -> None:
    """Logits of all tokens, and greedy tokens far past the windows."""
    model, batch = tiny_model(family), batch_of(padding, family)
    forward, counter = (None, None) if backend is None else compiled(model, backend)
    check_logits(model, batch, cache, forward)
    assert counter is None or counter.frame_count > 0
    if cache is None:
        return
    if counter is not None:
        counter.clear()
    options = {"cache_implementation": cache, "disable_compile": True}
    if cache == "static" and counter is not None:
        options = compiled_decoding(counter)
    elif forward is not None:
        model.forward = forward
    check_tokens(model, tiny_model(family, "eager"), batch, **options)
    assert counter is None or counter.frame_count > 0


def grid(families: tuple[str, ...], quick: dict[str, tuple[str, ...]]) -> list:
    """(family, padding, backend) for parametrize; compiled ones are slow but for the `quick`: paddings by family."""
    return [
        pytest.param(
            family,
            padding,
            backend,
            id=f"{family}-{padding} padding-{'eager' if backend is None else 'compiled'}",
            marks=[] if backend is None or padding in quick.get(family, ()) else [pytest.mark.slow],
        )
        for backend in (None, "aot_eager")
        for family in families
        for padding in PADDINGS
    ]


QUICK_DYNAMIC = {"llama": ("left",), "mistral": ("none",)}
QUICK_STATIC = {
    "llama": ("none",),
    "mistral": ("left",),
    "gemma2": ("right",),
    "gemma3": ("none",),
    "gpt_oss": ("left",),
    "whisper": ("right",),
}
QUICK_WITHOUT_CACHE = {"bert": ("left",), "modernbert": ("right",)}


@pytest.mark.parametrize(("family", "padding", "backend"), grid(support.WITH_DECODER, QUICK_DYNAMIC))
def test_dynamic_cache(family, padding, backend, record_property):
    check_cell(family, "dynamic", padding, backend)
    record_property("cell", True)


@pytest.mark.parametrize(("family", "padding", "backend"), grid(support.WITH_DECODER, QUICK_STATIC))
def test_static_cache(family, padding, backend, record_property):
    check_cell(family, "static", padding, backend)
    record_property("cell", True)


@pytest.mark.parametrize(("family", "padding", "backend"), grid(support.ENCODERS, QUICK_WITHOUT_CACHE))
def test_no_cache(family, padding, backend, record_property):
    check_cell(family, None, padding, backend)
    record_property("cell", True)


@pytest.mark.slow
@pytest.mark.parametrize("family", support.FAMILIES)
def test_inductor(family):
    check_cell(family, None if family in support.ENCODERS else "static", "left", "inductor")


def check_that_it_matters(family: str, is_compiled: bool, **without_it) -> None:
    """Logits equal those of eager attention, and are others without a feature."""
    model, batch = tiny_model(family), batch_of("left", family, length=31)
    forward, _ = compiled(model) if is_compiled else (None, None)
    check_logits(model, batch, forward=forward)
    difference = logits_of(model, batch, forward) - logits_of(tiny_model(family, **without_it), batch)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(("family", "is_compiled"), support.cells(support.FEATURES["sliding window"]))
def test_sliding_window(family, is_compiled):
    wide = {"local_attention": 127} if family == "modernbert" else {"sliding_window": 64}
    check_that_it_matters(family, is_compiled, **wide)


@pytest.mark.parametrize(("family", "is_compiled"), support.cells(support.FEATURES["softcap"]))
def test_softcap(family, is_compiled):
    check_that_it_matters(family, is_compiled, attn_logit_softcapping=None)


@pytest.mark.parametrize(("family", "is_compiled"), support.cells(support.FEATURES["sinks"]))
def test_sinks(family, is_compiled):
    """Their gradients alone, which are few among those of all parameters."""
    model, errors = tiny_model(family), ErrorPool("gradients of the sinks")
    forward, _ = compiled(model) if is_compiled else (None, None)
    for seed in range(8):
        batch = batch_of("left", family, seed=seed)

        def gradients(model, forward=None, batch=batch):
            named = loss_and_gradients(model, batch, forward).items()
            return torch.cat([gradient for name, gradient in named if name.endswith("sinks")])

        eager, exact = (gradients(twin) for twin in twins(model))
        assert exact.abs().max() > 1e-3
        errors.add(gradients(model, forward), exact, [eager])
    assert errors.excess() is None


@pytest.mark.parametrize(("family", "is_compiled"), support.cells(support.FEATURES["cross attention"]))
def test_cross_attention(family, is_compiled):
    """The decoder's padding is not the encoder's."""
    model = tiny_model(family)
    forward, _ = compiled(model) if is_compiled else (None, None)
    for padding, padding_of_encoder in (("right", "left"), ("none", "right"), ("left", "none")):
        batch = batch_of(padding, family)
        check_logits(model, batch._replace(encoder=batch_of(padding_of_encoder, family).encoder), forward=forward)


@pytest.mark.parametrize(
    ("family", "is_compiled"), support.cells(support.FAMILIES, quick=("mistral", "gpt_oss", "modernbert"))
)
def test_training(family, is_compiled):
    """Gradients of all parameters."""
    model = tiny_model(family)
    forward, counter = compiled(model) if is_compiled else (None, None)
    for padding in PADDINGS:
        check_training(model, draws_of(padding, family), forward)
    assert counter is None or counter.frame_count == 2, "one with a mask, one without"


@pytest.mark.slow
@pytest.mark.parametrize("family", support.FAMILIES)
def test_training_with_inductor(family):
    model = tiny_model(family)
    forward, _ = compiled(model, "inductor")
    for padding in ("left", "right"):
        check_training(model, draws_of(padding, family), forward)


@pytest.mark.parametrize("family", support.FAMILIES)
def test_training_curve(family):
    batches = [batch_of(padding, family, seed=seed) for seed, padding in enumerate(PADDINGS)]
    ours, eager = (losses_of_training(tiny_model(family, name), batches) for name in ("modelopt_triton", "eager"))
    assert ours[-1] < ours[0] - 1, "a curve that stays where it is tests nothing"
    torch.testing.assert_close(ours, eager, rtol=0, atol=CURVE_TOLERANCE)


def draws_of(padding: str, family: str) -> Iterator[Batch]:
    return (batch_of(padding, family, seed=seed) for seed in range(DRAWS))


def losses_of_training(model: PreTrainedModel, batches: list) -> torch.Tensor:
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=3e-3), []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss_of(model, batches[step % len(batches)]))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


@pytest.mark.parametrize(("family", "is_compiled"), support.cells(support.FEATURES["packed documents"]))
def test_packed_documents(family, is_compiled):
    """Logits and gradients of each document as if it were alone, in one row and in two."""
    # Nothing but the lengths tells bidirectional attention where documents end.
    for form in ("cumulative lengths",) if family in support.ENCODERS else FORMS:
        for rows in (1, 2):
            model = tiny_model(family).train(rows == 2)
            forward = compiled(model)[0] if is_compiled else None
            check_packed(model, form, rows, forward)


def test_readme_shows_what_these_tests_prove(request):
    names = [item.name for item in request.node.parent.collect()]
    for feature, families in support.FEATURES.items():
        for family in families:
            for mode in support.MODES:
                found = [name for name in names if support.is_name_of(name, family, feature, mode)]
                assert found, f"no test of {family}, {feature}, {mode}"
    _, _, after = README.read_text().partition(support.README_BEGIN)
    assert after.partition(support.README_END)[0] == support.rendered()


def test_the_checks_see_a_lost_mask():
    model = tiny_model("llama")

    def without_mask(attention_mask=None, **inputs):
        return model(**inputs)

    check_logits(model, batch_of("left"))
    with pytest.raises(AccuracyError, match="logits: max error"):
        check_logits(model, batch_of("left"), forward=without_mask)


def test_the_checks_see_a_window_of_another_size():
    other = tiny_model("modernbert", local_attention=9)
    with pytest.raises(AccuracyError, match="logits: max error"):
        check_logits(tiny_model("modernbert"), batch_of("left"), forward=other)
