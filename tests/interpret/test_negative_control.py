"""Negative controls: a broken kernel must fail the checks, each in its own way.

They also prove that CPU tensors run the kernels here: nothing else that they break is on a CPU tensor's way.
"""

import pytest
import triton
import triton.language as tl

import fa_ops
from fa_ops.kernels import primitives
from tests.interpret.test_properties import plain_case
from tests.support import accuracy
from tests.support.accuracy import AccuracyError, check_case
from tests.support.memory import CanaryError

FORWARD, BACKWARD = "fa_ops.kernels.forward", "fa_ops.kernels.backward"


def _readable(value) -> str | None:
    return value.rpartition(".")[2] if isinstance(value, str) else getattr(value, "__name__", None)


@triton.jit
def sees_one_key_more(offs_m, offs_n, len_q, len_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):  # noqa: N803
    return (offs_n < len_k) & (offs_n <= offs_m + (len_k - len_q) + 1)


@triton.jit
def forgets_the_last_keys(
    m0, len_q, len_k, left, right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    return 0, 0, 0, tl.maximum(len_k - BLOCK_N, 0)


@triton.jit
def stores_half_of_the_rows(base_ptr, stride_t, rows, offs_d, tile, row_mask, HEAD_DIM: tl.constexpr):  # noqa: N803
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    mask = row_mask & (rows % 2 == 0)
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def stores_one_row_past_the_end(base_ptr, stride_t, rows, offs_d, tile, row_mask, HEAD_DIM: tl.constexpr):  # noqa: N803
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    mask = rows <= tl.max(tl.where(row_mask, rows, -1), 0) + 1
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :])


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Nothing here is a matter of luck."""
    monkeypatch.setattr(accuracy, "DRAWS", 1)


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("module", "name", "broken", "message"),
    [
        (FORWARD, "is_visible", sees_one_key_more, "out: max error"),
        (BACKWARD, "is_visible", sees_one_key_more, "dq: max error"),
        (FORWARD, "key_range", forgets_the_last_keys, "lse: -inf came"),
        (BACKWARD, "key_range", forgets_the_last_keys, "dq: max error"),
        (FORWARD, "LOG2E", tl.constexpr(1.4427), "out: max error"),
        (BACKWARD, "LOG2E", tl.constexpr(1.4427), "dq: max error"),
    ],
    ids=_readable,
)
def test_wrong_numbers_fail(monkeypatch, is_padded: bool, module: str, name: str, broken, message: str):
    monkeypatch.setattr(f"{module}.{name}", broken)
    with pytest.raises(AccuracyError, match=message):
        check_case(fa_ops.attention, plain_case(is_padded, True, (20, 7), (20, 9)))


@pytest.mark.parametrize("module", [FORWARD, BACKWARD], ids=_readable)
def test_stores_past_the_end_fail(monkeypatch, module: str):
    monkeypatch.setattr(f"{module}.store_rows", stores_one_row_past_the_end)
    with pytest.raises(CanaryError, match="allocation "):
        check_case(fa_ops.attention, plain_case(False, True, (20, 7), (20, 9)))


def test_unwritten_output_fails(monkeypatch):
    # padded outputs are allocated without a value, so what a kernel leaves out stays poison
    monkeypatch.setattr(f"{FORWARD}.store_rows", stores_half_of_the_rows)
    with pytest.raises(AccuracyError, match="out: nan came"):
        check_case(fa_ops.attention, plain_case(True, True, (20, 7), (20, 9)))


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_whole_kernels_pass(is_padded: bool):
    """The control of the controls: unbroken, the same case passes."""
    assert primitives.is_visible is not sees_one_key_more
    check_case(fa_ops.attention, plain_case(is_padded, True, (20, 7), (20, 9)))
