"""torch.compile with fullgraph=True: two graphs, one with a mask and one without, for many lengths."""

import pytest
from torch._dynamo.testing import CompileCounterWithBackend

from tests.models.checks import check_tokens, compiled, compiled_decoding, loss_of
from tests.models.tiny import PADDINGS, batch_of, tiny_model

LENGTHS = (11, 8, 13, 20, 31)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_two_frames_for_five_lengths(padding, use_cache):
    model = tiny_model("llama", num_hidden_layers=1, use_cache=use_cache).train()
    forward, counter = compiled(model)
    for length in LENGTHS:
        loss_of(model, batch_of(padding, length=length), forward).backward()
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize(("family", "frames"), [("llama", 2), ("mistral", 3)])
def test_frames_of_decoding(family, frames):
    # One with a mask, one without; and Transformers counts a window's positions in an int, once constant, then not.
    model, counter = tiny_model(family), CompileCounterWithBackend("aot_eager")
    options = compiled_decoding(counter)
    for padding in PADDINGS:
        check_tokens(model, tiny_model(family, "eager"), batch_of(padding), **options)
    assert 1 <= counter.frame_count <= frames


def test_static_caches_of_several_lengths():
    model, eager = (tiny_model("llama", name, num_hidden_layers=1) for name in ("modelopt_triton", "eager"))
    model.forward, counter = compiled(model)
    for length in (11, 13, 17):
        check_tokens(model, eager, batch_of("none", length=length), cache_implementation="static", disable_compile=True)
    assert 1 <= counter.frame_count <= 4, "prefill and decoding, of one length and of any"
