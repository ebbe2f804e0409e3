"""The same bits: in repeats, on a side stream, in CUDA graphs, past 2^31 elements, among 70,000 sequences."""

import dataclasses

import pytest
import torch
from torch import Tensor

import fa_ops
from fa_ops.reference import attention_reference
from tests.support.accuracy import ErrorPool, evaluate
from tests.support.cases import Inputs
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits, check_repeats

pytestmark = pytest.mark.gpu

LENS = (1, 700, 0, 333, 64, 129, 1024, 2, 17)
each_layout = pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])


def case_of(lens: tuple[int, ...], **changes):
    defaults = {"lens_q": lens, "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, "has_dlse": True}
    return small_case(**defaults | changes)


@each_layout
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 96), (torch.float32, 64)],
    ids=str,
)
def test_hundred_repeats(dtype: torch.dtype, head_dim: int, is_padded: bool):
    case = case_of(LENS, dtype=dtype, head_dim=head_dim, value_dim=head_dim, heads_kv=4, is_padded=is_padded)
    check_repeats(fa_ops.attention, case, "cuda", repeats=100)


@each_layout
def test_side_stream(is_padded: bool):
    """Kernels are launched on the current stream: there they wait for inputs that arrive late."""
    inputs = case_of(LENS, is_padded=is_padded).build("cuda")
    expected = evaluate(fa_ops.attention, inputs)
    late = dataclasses.replace(inputs, q=torch.full_like(inputs.q, torch.nan))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.q.copy_(inputs.q)
        found = evaluate(fa_ops.attention, late)
    side.synchronize()
    assert_same_bits(found, expected, "on a side stream")


@each_layout
def test_cuda_graph_replays_with_other_lengths(is_padded: bool):
    inputs = case_of((40, 300, 0, 129), is_padded=is_padded, max_input_len="none").build("cuda")
    static = dataclasses.replace(
        inputs, **{name: getattr(inputs, name).nan_to_num().clone() for name in ("q", "k", "v", "dout", "dlse")}
    )
    static = dataclasses.replace(static, b_start_loc=inputs.b_start_loc.clone(), b_seq_len=inputs.b_seq_len.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(fa_ops.attention, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = evaluate(fa_ops.attention, static)
    for lens in ((40, 300, 0, 129), (1, 2, 3, 4), (0, 0, 0, 0), (300, 31, 100, 7)):
        starts = [0] * 4 if is_padded else [sum(lens[:i]) for i in range(4)]
        static.b_seq_len.copy_(torch.tensor(lens))
        static.b_start_loc.copy_(torch.tensor(starts))
        static.q.normal_()
        graph.replay()
        assert_same_bits(replayed, evaluate(fa_ops.attention, static), f"between a replayed graph and eager for {lens}")


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, in a storage of its own."""
    t = torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
    assert sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) > 2**31
    return t


@pytest.fixture
def _memory_given_back():
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("_memory_given_back")
@pytest.mark.parametrize("layout", ["packed", "padded", "packed_head_major"])
def test_past_two_to_the_31_elements(layout: str):
    """Sequences at both ends of tensors that 32-bit offsets cannot span, against the same ones close together."""
    heads, dim, n = 8, 128, 200
    near = case_of((n, n), heads_kv=heads, group_size=1, head_dim=dim, value_dim=dim, is_padded=True).build("cuda")
    expected = evaluate(fa_ops.attention, near)
    if layout == "padded":
        rows = 2**30 // (heads * dim) + 2 * n
        shape, strides = (2, rows, heads, dim), (rows * heads * dim, heads * dim, dim, 1)
    elif layout == "packed":
        rows = 2**31 // (heads * dim) + 2 * n
        shape, strides = (rows, heads, dim), (heads * dim, dim, 1)
    else:
        rows = 2**31 // (dim * (heads - 1)) + 2 * n
        shape, strides = (rows, heads, dim), (dim, rows * dim, 1)
    starts = (0, rows - n)
    at = [(i, slice(s, s + n)) if layout == "padded" else (slice(s, s + n),) for i, s in enumerate(starts)]
    far = {name: far_apart(shape, strides, torch.bfloat16) for name in ("q", "k", "v", "dout")}
    lse_shape = (*shape[:-3], heads, rows)
    dlse = torch.zeros(lse_shape, device="cuda")
    for i, where in enumerate(at):
        for name, t in far.items():
            t[where] = getattr(near, name)[i, :n]
        dlse.transpose(-1, -2)[where] = near.dlse[i, :, :n].T
    found = evaluate(
        fa_ops.attention,
        dataclasses.replace(near, **far, dlse=dlse, b_start_loc=torch.tensor(starts, device="cuda", dtype=torch.int64)),
    )
    found["lse"], expected["lse"] = found["lse"].transpose(-1, -2), expected["lse"].transpose(-1, -2)
    for i, where in enumerate(at):
        assert_same_bits(
            {name: t[where] for name, t in found.items()},
            {name: t[i, :n] for name, t in expected.items()},
            f"in sequence {i}, far from the other",
        )
    if layout != "padded":
        between = slice(n, rows - n)
        assert not found["out"][between].any()
        assert (found["lse"][between] == -torch.inf).all()
        assert not any(found[name][between].any() for name in ("dq", "dk", "dv"))


@each_layout
def test_seventy_thousand_sequences(is_padded: bool):
    """More than a launch grid's 65,535: the same bits as in batches of 10,000, and those of the last 64 accurate."""
    lens = tuple(n % 4 for n in range(70_000))
    inputs = case_of(lens, heads_kv=1, head_dim=16, value_dim=16, is_padded=is_padded).build("cuda")
    together = evaluate(fa_ops.attention, inputs)
    for first in range(0, 70_000, 10_000):
        found, rows = _part(inputs, first, first + 10_000, fa_ops.attention)
        assert_same_bits({name: t[rows] for name, t in _by_rows(together).items()}, found, f"from sequence {first} on")
    found, _ = _part(inputs, 69_936, 70_000, fa_ops.attention)
    exact, _ = _part(inputs, 69_936, 70_000, attention_reference, dtype=torch.float64)
    plain = [
        _part(inputs, 69_936, 70_000, attention_reference, upcast=False, reorder_ops=reorder_ops)[0]
        for reorder_ops in (False, True)
    ]
    for name, result in found.items():
        pool = ErrorPool(name)
        pool.add(result, exact[name], [reference[name] for reference in plain])
        assert pool.excess() is None, pool.excess()


def _by_rows(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.transpose(-1, -2) if name == "lse" else t for name, t in results.items()}


def _part(inputs: Inputs, first: int, end: int, attention, **options) -> tuple[dict[str, Tensor], slice]:
    """Results of the sequences [first, end) alone, row by row, and where their rows are among all."""
    if inputs.case.is_padded:
        rows = slice(first, end)
    else:
        rows = slice(int(inputs.b_start_loc[first]), int(inputs.b_start_loc[end - 1] + inputs.b_seq_len[end - 1]))
    parts = {name: getattr(inputs, name)[rows] for name in ("q", "k", "v", "dout")}
    start = inputs.b_start_loc[first:end]
    part = dataclasses.replace(
        inputs,
        **parts,
        dlse=inputs.dlse[rows] if inputs.case.is_padded else inputs.dlse[:, rows],
        b_start_loc=start if inputs.case.is_padded else start - start[0],
        b_seq_len=inputs.b_seq_len[first:end],
    )
    return _by_rows(evaluate(attention, part, **options)), rows
