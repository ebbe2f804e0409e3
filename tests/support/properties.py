"""What holds bit for bit: repeats, batch invariance, the isolation of NaN, and arguments without influence."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.accuracy import evaluate
from tests.support.cases import Case, Inputs


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for name, tensor in expected.items():
        if not torch.equal(_bits(found[name]), _bits(tensor)):
            differs = (_bits(found[name]) != _bits(tensor)).nonzero()
            raise AssertionError(f"{name}: {len(differs)} elements differ {where}, the first at {differs[0].tolist()}")


def check_repeats(attention: Callable, case: Case, device: str = "cpu", repeats: int = 3) -> None:
    """The same inputs give the same bits."""
    inputs = case.build(device)
    first = evaluate(attention, inputs)
    for repeat in range(1, repeats):
        assert_same_bits(evaluate(attention, inputs), first, f"in repeat {repeat}")


def check_batch_invariance(attention: Callable, case: Case, device: str = "cpu") -> None:
    """A sequence's results, gradients included, are the same alone and among its neighbours."""
    inputs = case.build(device)
    together = evaluate(attention, inputs)
    for seq in range(len(case.lens_q)):
        alone, rows_q, rows_k = _alone(inputs, seq)
        # alone, a padded sequence keeps its place in its row, a packed one is all there is
        rows_alone = [(slice(0, 1), *rows[1:]) if case.is_padded else (slice(None),) for rows in (rows_q, rows_k)]
        assert_same_bits(
            _rows_of(evaluate(attention, alone), *rows_alone),
            _rows_of(together, rows_q, rows_k),
            f"between sequence {seq} alone and in its batch",
        )


def check_nan_isolation(attention: Callable, case: Case, device: str = "cpu", hidden: tuple[str, ...] = ()) -> None:
    """NaN in the q, k, v or dout of one sequence changes no bit of the others' results, and does reach its own.

    hidden: the tensors whose NaN need not show in the sequence's own results.
    """
    clean = evaluate(attention, case.build(device))
    for seq in range(len(case.lens_q)):
        for tainted in ("q", "k", "v", "dout"):
            inputs = case.build(device)
            _, rows_q, rows_k = _alone(inputs, seq)
            getattr(inputs, tainted)[rows_k if tainted in ("k", "v") else rows_q] = torch.nan
            found = evaluate(attention, inputs)
            if inputs.sees[rows_q].any() and tainted not in hidden:
                own = _rows_of(found, rows_q, rows_k)
                reached = own["dq"] if tainted == "dout" else own["out"]
                assert reached.isnan().any(), f"NaN in the {tainted} of sequence {seq} does not show in its results"
            for other in range(len(case.lens_q)):
                if other != seq:
                    _, rows_q_other, rows_k_other = _alone(inputs, other)
                    assert_same_bits(
                        _rows_of(found, rows_q_other, rows_k_other),
                        _rows_of(clean, rows_q_other, rows_k_other),
                        f"in sequence {other} for NaN in the {tainted} of sequence {seq}",
                    )


def check_max_input_len_ignored(attention: Callable, case: Case, device: str = "cpu") -> None:
    """None, 0, and a maximum far too large give the same bits."""
    inputs = case.build(device)
    has_key_side = inputs.b_seq_len_k is not None
    expected = evaluate(attention, dataclasses.replace(inputs, max_input_len=None, max_input_len_k=None))
    for size in (0, 1, 1 << 20):
        found = dataclasses.replace(inputs, max_input_len=size, max_input_len_k=size if has_key_side else None)
        assert_same_bits(evaluate(attention, found), expected, f"for max_input_len {size}")


def _alone(inputs: Inputs, seq: int) -> tuple[Inputs, tuple, tuple]:
    """The sequence as a batch of its own, and where its rows of q and of k lie in the whole batch."""
    start_k = inputs.b_start_loc if inputs.b_start_loc_k is None else inputs.b_start_loc_k
    len_k = inputs.b_seq_len if inputs.b_seq_len_k is None else inputs.b_seq_len_k
    rows_q, rows_k = (
        slice(int(start[seq]), int(start[seq] + length[seq]))
        for start, length in ((inputs.b_start_loc, inputs.b_seq_len), (start_k, len_k))
    )
    own = slice(seq, seq + 1)
    if inputs.case.is_padded:
        in_q = in_k = (own,)
        rows_q, rows_k = (own, rows_q), (own, rows_k)
        in_lse = (own,)
    else:
        in_q, in_k = (rows_q,), (rows_k,)
        rows_q, rows_k = in_q, in_k
        in_lse = (slice(None), *rows_q)

    def start(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[own] if inputs.case.is_padded else torch.zeros_like(t[own])

    threshold = inputs.skip_softmax_threshold
    alone = dataclasses.replace(
        inputs,
        q=inputs.q[in_q],
        k=inputs.k[in_k],
        v=inputs.v[in_k],
        b_start_loc=start(inputs.b_start_loc),
        b_seq_len=inputs.b_seq_len[own],
        b_start_loc_k=start(inputs.b_start_loc_k),
        b_seq_len_k=None if inputs.b_seq_len_k is None else inputs.b_seq_len_k[own],
        key_mask=None if inputs.key_mask is None else inputs.key_mask[own],
        skip_softmax_threshold=threshold[own] if isinstance(threshold, Tensor) and threshold.dim() else threshold,
        dout=inputs.dout[in_q],
        dlse=None if inputs.dlse is None else inputs.dlse[in_lse],
    )
    return alone, rows_q, rows_k


def _rows_of(results: dict[str, Tensor], rows_q: tuple, rows_k: tuple) -> dict[str, Tensor]:
    of_queries = {name: results[name][rows_q] for name in ("out", "dq")}
    of_keys = {name: results[name][rows_k] for name in ("dk", "dv")}
    return {**of_queries, "lse": results["lse"].transpose(-1, -2)[rows_q], **of_keys}


def _bits(t: Tensor) -> Tensor:
    positive_zeros = t + 0.0  # -0 is 0
    return positive_zeros.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)
