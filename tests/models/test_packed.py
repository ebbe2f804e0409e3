"""Packed sequences, in every form in which they come: each document as if it were alone."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fa_ops import varlen
from tests.models.tiny import DEVICE, VOCABULARY, check_accuracy, tiny_model, twins
from tests.support.accuracy import AccuracyError, ErrorPool

LENGTHS = (12, 1, 3, 15, 1)  # some longer than the windows of 8
FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss")
FORMS = ("positions", "positions, no cache", "cumulative lengths")


DRAWS = 4


def documents_of(rows: int = 1, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def document(length: int) -> torch.Tensor:
        return torch.randint(2, VOCABULARY, (length,), generator=generator).to(DEVICE)

    return [[document(length) for length in (*LENGTHS[i:], *LENGTHS[:i])] for i in range(rows)]


def positions_of(documents: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.arange(len(document), device=DEVICE) for document in documents])


def packed(documents: list[list[torch.Tensor]], form: str) -> dict[str, torch.Tensor | bool | int]:
    """A model's arguments."""
    ids = torch.stack([torch.cat(row) for row in documents])
    positions = torch.stack([positions_of(row) for row in documents])
    if form == "cumulative lengths":
        lengths = torch.tensor([len(document) for row in documents for document in row], device=DEVICE)
        cu_seq_lens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return {
            "input_ids": ids, "position_ids": positions, "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": 15, "max_length_k": 15,
        }  # fmt: skip
    return {"input_ids": ids, "position_ids": positions, "use_cache": form == "positions"}


def results(model, documents, arguments=None, forward=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all documents and the gradients of all parameters, packed or (without arguments) one by one."""
    model.zero_grad()
    if arguments is None:
        logits = torch.cat([model(document[None]).logits[0] for row in documents for document in row])
    else:
        logits = (model if forward is None else forward)(**arguments).logits.flatten(0, 1)
    targets = torch.cat([document for row in documents for document in row])
    torch.nn.functional.cross_entropy(logits, targets).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check(model, form, forward=None, of=documents_of) -> None:
    pools = ErrorPool("logits"), ErrorPool("gradients")
    for draw in range(DRAWS):
        documents = of(seed=draw)
        eager, exact = (results(twin, documents) for twin in twins(model))
        for pool, ours, *of_twins in zip(
            pools, results(model, documents, packed(documents, form), forward), exact, eager, strict=True
        ):
            pool.add(ours, of_twins[0], of_twins[1:])
        if not any(pool.excess() for pool in pools):
            return
    raise AccuracyError("; ".join(filter(None, (pool.excess() for pool in pools))))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_equal_documents_alone(family, form, rows):
    check(tiny_model(family).train(), form, of=functools.partial(documents_of, rows))


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


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family, form, fresh_compiler):
    model, counter = tiny_model(family), CompileCounterWithBackend("aot_eager")
    check(model, form, torch.compile(model, fullgraph=True, backend=counter))
    assert counter.frame_count == 1


def test_one_graph_for_any_documents(fresh_compiler):
    model, counter = tiny_model("llama", num_hidden_layers=1), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for chosen in (slice(None), slice(3), slice(3, None), slice(1)):
        check(model, "positions", forward, lambda seed, chosen=chosen: [documents_of(1, seed)[0][chosen]])
    assert 1 <= counter.frame_count <= 2


def test_compiled_with_windows_and_a_cache(fresh_compiler):
    # What the mask function cannot know of packing then, the positions tell.
    model = tiny_model("mistral", num_hidden_layers=1)
    check(model, "positions", torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_left_padded_positions_are_not_packed_sequences():
    model, document = tiny_model("llama"), documents_of()[0][0]
    ids = torch.cat((torch.zeros(4, dtype=torch.long, device=DEVICE), document))[None]
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(document[None]).logits
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(padded, alone)


def test_positions_along_three_axes():
    # text, an image of 2 x 2 after it, text; then a document of a single token, and one more
    axes = [[0, 1, 2, 2, 2, 2, 4, 0, 0, 1], [0, 1, 2, 2, 3, 3, 4, 0, 0, 1], [0, 1, 2, 3, 2, 3, 4, 0, 0, 1]]
    starts = varlen.document_starts(torch.tensor(axes)[:, None])
    assert starts.int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("shape", [(10,), (1, 10)])
def test_positions_along_one_axis(shape):
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 5, 6, 1, 2])
    assert varlen.document_starts(positions.view(shape)).int().tolist() == [[1, 0, 0, 1, 1, 0, 1, 0, 1, 0]]


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
