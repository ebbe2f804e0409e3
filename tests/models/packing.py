"""Packed documents in every form in which they come, and the check that each is as if it were alone."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from tests.models.checks import twins
from tests.models.tiny import DEVICE, VOCABULARY
from tests.support.accuracy import AccuracyError, ErrorPool

LENGTHS = (12, 1, 3, 15, 1)  # some longer than the windows of 8
FORMS = ("positions", "positions, no cache", "cumulative lengths")
DRAWS = 4

Documents = list[list[Tensor]]


def documents_of(rows: int = 1, seed: int = 0) -> Documents:
    """In other orders in each row."""
    generator = torch.Generator().manual_seed(seed)

    def document(length: int) -> Tensor:
        return torch.randint(2, VOCABULARY, (length,), generator=generator).to(DEVICE)

    return [[document(length) for length in (*LENGTHS[i:], *LENGTHS[:i])] for i in range(rows)]


def packed(documents: Documents, form: str) -> dict[str, Tensor | bool | int]:
    """A model's arguments."""
    ids = torch.stack([torch.cat(row) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(len(d), device=DEVICE) for d in row]) for row in documents])
    if form == "cumulative lengths":
        lengths = torch.tensor([len(document) for row in documents for document in row], device=DEVICE)
        cu_seq_lens = pad(lengths.cumsum(0), (1, 0)).int()
        return {
            "input_ids": ids, "position_ids": positions, "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
        }  # fmt: skip
    return {"input_ids": ids, "position_ids": positions, "use_cache": form == "positions"}


def results(
    model: PreTrainedModel, documents: Documents, arguments: dict | None = None, forward: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of all documents and the gradients of all parameters, packed or (without arguments) one by one."""
    model.zero_grad()
    if arguments is None:
        logits = torch.cat([model(document[None]).logits[0] for row in documents for document in row])
    else:
        logits = (forward or model.forward)(**arguments).logits.flatten(0, 1)
    targets = torch.cat([document for row in documents for document in row])
    cross_entropy(logits, targets).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_packed(
    model: PreTrainedModel,
    form: str,
    rows: int = 1,
    forward: Callable | None = None,
    chosen: slice = slice(None),
    pack: Callable[[Documents, str], dict] = packed,
) -> None:
    """Logits and gradients of documents, or of the `chosen` ones of each row."""
    pools = ErrorPool("logits"), ErrorPool("gradients")
    for seed in range(DRAWS):
        documents = [row[chosen] for row in documents_of(rows, seed)]
        eager, exact = (results(twin, documents) for twin in twins(model))
        ours = results(model, documents, pack(documents, form), forward)
        for pool, *of_each in zip(pools, ours, exact, eager, strict=True):
            pool.add(of_each[0], of_each[1], of_each[2:])
        if not any(pool.excess() for pool in pools):
            return
    raise AccuracyError("; ".join(filter(None, (pool.excess() for pool in pools))))
