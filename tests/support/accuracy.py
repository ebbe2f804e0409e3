"""The accuracy rule: no tolerance is picked by hand.

Against the oracle in float64, in max and in mean, the error of each result is at most twice the error of plain torch
in the same dtype, plus one rounding of the result. Plain torch's error is the larger one of two orders of operations.
What is 0 or -inf by definition must be so exactly.

A maximum over few numbers says little, so a case that fails is given more draws of its values, and judged on all of
them together, the first included: that tells an error from bad luck, and excuses none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fa_ops.reference import attention_reference
from tests.support.cases import Case, Inputs
from tests.support.memory import poisoned_allocations

DRAWS = 16


class AccuracyError(AssertionError):
    """A result is further from the oracle than the rule allows."""


def check_case(
    attention: Callable, case: Case, device: str = "cpu", is_lse_float32: bool = True, has_gradients: bool = True
) -> dict[str, Tensor]:
    """Runs a case forward and backward amid poison, applies every rule, and returns the results by name.

    is_lse_float32: lse is held to what plain torch reaches in float32, whatever the dtype of the inputs; for sums that
        are rounded to nearest, as tensor cores do not.
    has_gradients: forward alone if False.
    """
    pools: dict[str, ErrorPool] = {}
    for draw in range(DRAWS):
        inputs = case.build(device, draw)
        with poisoned_allocations(inputs.canaries):
            results = evaluate(attention, inputs, has_gradients=has_gradients)
        inputs.canaries.check()
        check_structure(inputs, results)
        exact = evaluate(attention_reference, inputs, torch.float64, has_gradients)
        references = [
            _evaluate_in_same_dtype(inputs, reorder_ops, is_lse_float32, has_gradients) for reorder_ops in (False, True)
        ]
        for name, result in results.items():
            pool = pools.setdefault(name, ErrorPool(name))
            pool.add(result, exact[name], [reference[name] for reference in references])
        if all(pool.excess() is None for pool in pools.values()):
            return results
    raise AccuracyError("; ".join(filter(None, (pool.excess() for pool in pools.values()))))


def evaluate(
    attention: Callable, inputs: Inputs, dtype: torch.dtype | None = None, has_gradients: bool = True, **options
) -> dict[str, Tensor]:
    """out, lse and, unless there are to be no gradients, dq, dk, dv and, where there are sinks, dsinks of a call.

    `dtype` converts the inputs first; None leaves them where they lie in memory.
    """
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if inputs.sinks is not None:
        tensors["sinks"] = inputs.sinks
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_(has_gradients) for name, t in tensors.items()}
    out, lse = inputs.call(attention, **leaves, **options)
    if not has_gradients:
        return {"out": out, "lse": lse}
    outputs, grads = [out], [inputs.dout.to(out.dtype)]
    if inputs.dlse is not None:
        outputs.append(lse)
        grads.append(inputs.dlse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {"out": out.detach(), "lse": lse.detach(), **{f"d{name}": d for name, d in zip(leaves, grads, strict=True)}}


def check_structure(inputs: Inputs, results: dict[str, Tensor]) -> None:
    """What the contract says of dtypes, shapes, and of queries and keys that take no part."""
    q, k, v = inputs.q, inputs.k, inputs.v
    *rows, heads, _ = q.shape
    has_gradients = results.keys() != {"out", "lse"}
    for name, shape, dtype in (
        ("out", (*rows, heads, v.shape[-1]), q.dtype),
        ("lse", (*rows[:-1], heads, rows[-1]), torch.float32),
        *([("dq", q.shape, q.dtype), ("dk", k.shape, q.dtype), ("dv", v.shape, q.dtype)] if has_gradients else []),
        *([("dsinks", (heads,), inputs.sinks.dtype)] if has_gradients and inputs.sinks is not None else []),
    ):
        found = results[name]
        if found.shape != shape or found.dtype != dtype:
            raise AccuracyError(f"{name}: {found.dtype} {tuple(found.shape)} came, expected {dtype} {tuple(shape)}")
    sees_anything = inputs.sees if inputs.sinks is None else inputs.is_query
    unseen = [
        ("out", results["out"][~inputs.sees], 0.0, "queries that see no key"),
        ("lse", results["lse"].transpose(-1, -2)[~sees_anything], -torch.inf, "queries that see no key"),
    ]
    if has_gradients:
        unseen += [
            ("dq", results["dq"][~inputs.sees], 0.0, "queries that see no key"),
            ("dk", results["dk"][~inputs.is_seen], 0.0, "keys that no query sees"),
            ("dv", results["dv"][~inputs.is_seen], 0.0, "keys that no query sees"),
        ]
    for name, part, value, what in unseen:
        wrong = part[part != value]
        if len(wrong):
            raise AccuracyError(f"{name}: {wrong[0].item()} came for {what}, {len(wrong)} times; expected {value}")


class ErrorPool:
    """Errors of one result over one or more draws of the inputs' values."""

    def __init__(self, name: str):
        self.name = name
        self._draws: list[Tensor] = []  # each (max, mean) of: our error, plain torch's, the result's rounding
        self._worst, self._worst_error = "", -1.0

    def add(self, result: Tensor, exact: Tensor, references: list[Tensor]) -> None:
        """Raises AccuracyError for a result that is not finite where it must be, or finite where it must not."""
        is_finite = exact.isfinite()
        differs = torch.where(is_finite, ~result.isfinite(), result != exact)
        if differs.any():
            at = tuple(differs.nonzero()[0].tolist())
            raise AccuracyError(
                f"{self.name}: {result[at].item()} came at {at}, {exact[at].item():.6g} is exact "
                f"({int(differs.sum())} elements of {differs.numel()} so)"
            )
        result_double, exact = result.double()[is_finite], exact[is_finite]
        if not len(exact):
            return
        error = (result_double - exact).abs()
        reference_errors = [_max_and_mean((reference[is_finite] - exact).abs()) for reference in references]
        rounding = _max_and_mean(_rounding(exact, result.dtype))
        self._draws.append(torch.stack([_max_and_mean(error), torch.stack(reference_errors).amax(0), rounding]))
        worst = int(error.argmax())
        if error[worst] > self._worst_error:
            self._worst_error = float(error[worst])
            at = tuple(is_finite.nonzero()[worst].tolist())
            self._worst = f"{result_double[worst]:.6g} came at {at}, {exact[worst]:.6g} is exact"

    def excess(self) -> str | None:
        """What the rule has to say against the errors so far: None if nothing."""
        if not self._draws:
            return None
        draws = torch.stack(self._draws)
        pooled = {"max": draws[..., 0].amax(0).tolist(), "mean": draws[..., 1].mean(0).tolist()}
        for statistic, (error, reference_error, rounding) in pooled.items():
            allowed = 2 * reference_error + rounding
            if not error <= allowed:
                return (
                    f"{self.name}: {statistic} error {error:.3g} over {len(draws)} draws, {allowed:.3g} is allowed: "
                    f"2 x {reference_error:.3g} of plain torch + {rounding:.3g} of rounding; {self._worst}"
                )
        return None


def _max_and_mean(error: Tensor) -> Tensor:
    return torch.stack([error.max(), error.mean()]).cpu()


def _rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding to `dtype` at this magnitude: half a unit in the last place."""
    info = torch.finfo(dtype)
    return exact.abs().clamp_min(info.tiny) * (info.eps / 2)


def _evaluate_in_same_dtype(
    inputs: Inputs, reorder_ops: bool, is_lse_float32: bool, has_gradients: bool
) -> dict[str, Tensor]:
    options = {"upcast": False, "reorder_ops": reorder_ops}
    results = evaluate(attention_reference, inputs, has_gradients=has_gradients, **options)
    if is_lse_float32 and inputs.q.dtype != torch.float32:
        q, k, v = (t.float() for t in (inputs.q, inputs.k, inputs.v))
        sinks = None if inputs.sinks is None else inputs.sinks.float()
        _, results["lse"] = inputs.call(attention_reference, q, k, v, sinks=sinks, **options)
    return results
