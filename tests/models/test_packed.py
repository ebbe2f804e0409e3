"""Packed documents beside the matrix: in how many graphs, by which positions, and when they are refused."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from fa_ops import varlen
from fa_ops.integrations.huggingface import ATTENTION_NAME, triton_attention_forward
from tests.models.checks import check_accuracy, compiled, twins
from tests.models.packing import LENGTHS, check_packed, documents_of, packed, results
from tests.models.tiny import DEVICE, SIZES, tiny_model
from tests.support.accuracy import AccuracyError

LENGTH = sum(LENGTHS)


@pytest.mark.parametrize("is_packed", [False, True])
def test_several_rows_with_a_cache_are_not_copied_to_look_for_documents(is_packed):
    # On the CPU: a failed assertion ends the CUDA context of a process.
    model, documents = tiny_model("llama").cpu(), documents_of(2)
    arguments = {n: t.cpu() if torch.is_tensor(t) else t for n, t in packed(documents, "positions").items()}
    if is_packed:
        with pytest.raises(RuntimeError, match="position_ids restart within a row"):
            model(**arguments)
    else:
        arguments["position_ids"] = torch.arange(32).expand(2, -1)
        expected = twins(model)[0](**arguments).logits
        torch.testing.assert_close(model(**arguments).logits, expected)


def test_one_graph_for_any_documents(fresh_compiler):
    model = tiny_model("llama", num_hidden_layers=1)
    forward, counter = compiled(model)
    for chosen in (slice(None), slice(3), slice(3, None), slice(1)):
        check_packed(model, "positions", forward=forward, chosen=chosen)
    assert 1 <= counter.frame_count <= 2


def test_compiled_with_windows_and_a_cache(fresh_compiler):
    # What the mask function cannot know of packing then, the positions tell.
    model = tiny_model("mistral", num_hidden_layers=1)
    check_packed(model, "positions", forward=compiled(model)[0])


@pytest.mark.parametrize("shape", [(LENGTH,), (1, LENGTH), (2, LENGTH), (3, 1, LENGTH), (3, 2, LENGTH)], ids=str)
def test_shapes_of_positions(shape):
    """Outputs and gradients of the attention function itself: each document as if it were alone."""
    rows = shape[-2] if len(shape) > 1 else 1
    module = torch.nn.Module()
    positions = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in documents_of(rows)])
    positions = positions.to(DEVICE).expand(shape) if len(shape) > 1 else positions[0].to(DEVICE)
    query, key, value = (torch.randn(rows, heads, LENGTH, 16, device=DEVICE, requires_grad=True) for heads in (4, 2, 2))

    def attend(*of_document, **options):
        return triton_attention_forward(module, *of_document, None, is_causal=True, **options)[0]

    out = attend(query, key, value, position_ids=positions)
    alone = torch.zeros_like(out)
    for row, documents in enumerate(documents_of(rows)):
        end = 0
        for document in documents:
            start, end = end, end + len(document)
            alone[row, start:end] = attend(*(t[row, None, :, start:end] for t in (query, key, value)))[0]
    torch.testing.assert_close(out, alone)
    dout = torch.randn_like(out)
    of_each = (torch.autograd.grad(result, (query, key, value), dout, retain_graph=True) for result in (out, alone))
    torch.testing.assert_close(*of_each)


def test_a_model_with_positions_of_text_and_of_images():
    """(4, B, S): the text's, and those along three axes, of which only the text's are the documents'."""
    config = Qwen2_5_VLTextConfig(
        **{**SIZES, "hidden_size": 64},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        attn_implementation=ATTENTION_NAME,
    )
    model, documents = Qwen2_5_VLTextModel(config).to(DEVICE).eval(), documents_of()
    arguments = packed(documents, "positions")
    arguments["position_ids"] = arguments["position_ids"].expand(4, -1, -1)
    with torch.no_grad():
        alone = torch.cat([model(document[None]).last_hidden_state[0] for document in documents[0]])
        together = model(**arguments).last_hidden_state[0]
    torch.testing.assert_close(together, alone)


def test_positions_along_three_axes():
    # text, an image of 2 x 2 after it, text; then a document of a single token, and one more
    axes = [[0, 1, 2, 2, 2, 2, 4, 0, 0, 1], [0, 1, 2, 2, 3, 3, 4, 0, 0, 1], [0, 1, 2, 3, 2, 3, 4, 0, 0, 1]]
    starts = varlen.document_starts(torch.tensor(axes)[:, None])
    assert starts.int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("shape", [(10,), (1, 10)])
def test_positions_along_one_axis(shape):
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 5, 6, 1, 2])
    assert varlen.document_starts(positions.view(shape)).int().tolist() == [[1, 0, 0, 1, 1, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("bound", [None, 6, 4])
def test_documents_of_rows(bound):
    is_start = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0]]).bool()
    start, length = varlen.from_document_starts(is_start, bound)
    size = 8 if bound is None else bound
    assert start.tolist() == [0, 3, 4, 5] + [8] * (size - 4)
    assert length.tolist() == [3, 1, 1, 3] + [0] * (size - 4)
    assert start.dtype == length.dtype == torch.int32


def test_errors():
    with pytest.raises(ValueError, match=r"position_ids: shape \(\) given; expected \(S,\), \(B, S\) or \(C, B, S\)"):
        varlen.document_starts(torch.tensor(1))
    with pytest.raises(ValueError, match=r"is_start: shape \(3,\) given; expected \(B, S\)"):
        varlen.from_document_starts(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"is_start: dtype torch\.int64 given; accepted is bool"):
        varlen.from_document_starts(torch.ones(1, 3, dtype=torch.int64))


def test_the_checks_see_documents_that_read_each_other():
    model, documents = tiny_model("llama"), documents_of()
    arguments = packed(documents, "positions") | {"position_ids": None}
    eager, exact = (results(twin, documents)[0] for twin in twins(model))
    with pytest.raises(AccuracyError):
        check_accuracy("logits", results(model, documents, arguments)[0], exact, eager)


def test_the_collator_that_flattens_with_seq_idx():
    """seq_idx says once more what cu_seq_lens_q and position_ids say."""
    model = tiny_model("llama")
    rows = [{"input_ids": document.tolist()} for document in documents_of()[0]]
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in collate(rows).items()}
    assert {"seq_idx", "cu_seq_lens_q", "position_ids", "labels"} <= batch.keys()
    expected = torch.cat([model(document[None]).logits[0] for document in documents_of()[0]])
    torch.testing.assert_close(model(**batch).logits[0], expected)
    without = {name: batch[name] for name in ("input_ids", "position_ids", "seq_idx", "labels")}
    torch.testing.assert_close(model(**without).logits[0], expected)
    with pytest.raises(NotImplementedError, match=r"seq_idx .* without cu_seq_lens_q .* and without position_ids"):
        triton_attention_forward(
            model.model.layers[0].self_attn, *(torch.randn(1, 4, 5, 16, device=DEVICE),) * 3, None,
            seq_idx=torch.zeros(1, 5, device=DEVICE),
        )  # fmt: skip


@pytest.mark.parametrize(
    "positions", [[50, 51, 52, 53, 54], [0, 1, 2, 100, 101], [0, 2, 4, 6, 8], [3, 3, 4, 4, 5]], ids=str
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_gaps_begin_a_document_where_transformers_says_so(positions, use_cache):
    """Without a cache it does, and with one it does not."""
    model = tiny_model("llama")
    eager, exact = twins(model)
    ids = documents_of()[0][0][None, :5]
    options = {"position_ids": torch.tensor([positions], device=DEVICE), "use_cache": use_cache}
    with torch.no_grad():
        results = [m(ids, **options).logits for m in (model, exact, eager)]
    check_accuracy("logits", *results)
