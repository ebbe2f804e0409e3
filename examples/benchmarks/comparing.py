"""Whether implementations compute the same: looked at before any of them is timed."""

import torch
from cases import Case
from peers import Data
from report import Row
from timing import Run

from fa_ops.reference import attention_reference

TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 3e-2}
REFERENCE_ROWS = 64  # of the last sequence: float64 attention of all rows would take longer than the benchmark


def compare(prepared: dict[str, Run], direction: str, tolerance: float) -> dict[str, Row]:
    """Run each implementation once: the relative difference of its results from those of fa_ops, and an error where
    that is above the tolerance or where it raises."""
    findings: dict[str, Row] = {}
    ours: list[torch.Tensor] | None = None
    for impl, run in prepared.items():
        try:
            results = packed_results(run, direction)
        except Exception as error:
            findings[impl] = {"error": error_text(error)}
            continue
        findings[impl] = {}
        if impl == "fa_ops":
            ours = results
        elif ours is not None:
            difference = max(relative_difference(*pair) for pair in zip(results, ours, strict=True))
            findings[impl] = judged(difference, "fa_ops", tolerance)
    return findings


def judged(difference: float, expected: str, tolerance: float) -> Row:
    """The difference, and an error where it is above the tolerance or NaN."""
    if difference <= tolerance:
        return {"difference": difference}
    text = f"differs from {expected} by {difference:.1e}, more than {tolerance:.0e}"
    return {"difference": difference, "error": text}


@torch.no_grad()
def against_reference(run: Run, case: Case, data: Data) -> Row:
    """How far the output is from attention in float64, in the last rows of the last sequence, which as queries of
    their own see the same keys."""
    length = case.lengths[-1]
    rows = min(length, REFERENCE_ROWS)
    start, len_q, len_k = (torch.tensor([n], device=data.q.device) for n in (0, rows, length))
    expected = attention_reference(
        data.q[-rows:].double(), data.k[-length:].double(), data.v[-length:].double(), start, len_q,
        is_causal=case.is_causal, b_start_loc_k=start, b_seq_len_k=len_k,
    )  # fmt: skip
    difference = relative_difference(run.pack_outputs(run.forward())[-rows:], expected)
    return judged(difference, "attention in float64", TOLERANCE[case.dtype])


def has_run(finding: Row) -> bool:
    return "error" not in finding or "difference" in finding


def packed_results(run: Run, direction: str) -> list[torch.Tensor]:
    if direction == "forward":
        with torch.no_grad():
            return [run.pack_outputs(run.forward())]
    return [run.pack_gradient(gradient) for gradient in run.backward(run.forward())]


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()


def error_text(error: Exception) -> str:
    """One line: the error, and the one at the root of it, which compilers bury deep."""
    root: BaseException = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    texts = [f"{type(e).__name__}: {' '.join(str(e).split())}"[:300] for e in dict.fromkeys((error, root))]
    return "; from ".join(texts)
