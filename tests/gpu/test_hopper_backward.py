"""The backward kernels for sm_90 on a GPU: results, races, hangs.

They do not run with FA_OPS_KERNEL=portable in the environment. A kernel that hangs cannot be interrupted, so a test
that takes too long ends its process.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import fa_ops
from fa_ops import hopper_backward
from fa_ops.kernels import tier
from tests.support import properties
from tests.support.accuracy import check_case, evaluate
from tests.support.cases import Case
from tests.support.draw import Profile
from tests.support.hopper import count_launches, draw_launches, draw_many_backward
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180, method="thread"),
    pytest.mark.skipif(tier.TIER == "portable", reason="FA_OPS_KERNEL is 'portable'"),
    pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="the kernels are for sm_90"),
]

DTYPES = (torch.bfloat16, torch.float16)
PROFILE = Profile(DTYPES, ((64, 64), (128, 128)), max_len=2000, max_rows_by_heads=40_000, max_seqs=8, feature_rate=0.0)
CASES = draw_many_backward(PROFILE, 200)
each_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
each_layout = pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> Iterator[list]:
    """Holds an entry for each launch of the kernels, of which there must be one at least."""
    taken = count_launches(monkeypatch, hopper_backward)
    yield taken
    assert taken


def case_of(lens: tuple[int, ...], head_dim: int, **changes) -> Case:
    return small_case(lens_q=lens, dtype=torch.bfloat16, head_dim=head_dim, value_dim=head_dim, **changes)


@each_head_dim
def test_smallest(head_dim: int):
    """One tile, one block, one head."""
    case = case_of((20,), head_dim, heads_kv=1, group_size=1)
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False)


@each_head_dim
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_many_blocks_and_many_tiles(head_dim: int, is_causal: bool):
    """Each slot is used many times, by programs with several tiles each."""
    case = case_of((3000, 1, 1300), head_dim, heads_kv=4, is_causal=is_causal)
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False)


@each_head_dim
@pytest.mark.parametrize("length", [192, 1600, 3008])
def test_second_half_of_the_last_tile_is_empty(head_dim: int, length: int):
    check_case(fa_ops.attention, case_of((length,) * 8, head_dim, heads_kv=4), "cuda", is_lse_float32=False)


@each_head_dim
@pytest.mark.parametrize("length", [64, 128, 1600])
def test_short_tiles_follow_each_other(head_dim: int, length: int):
    """The next tile's queries are copied as soon as those of this one are out of shared memory: whether they are, the
    bits of many equal sequences tell, and how a sequence fares alone."""
    count, heads = 32_000 // length, 16
    q, k, v, dout = torch.randn(4, count * length, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    starts = torch.arange(count, dtype=torch.int32, device="cuda") * length
    lens = torch.full_like(starts, length)

    def differentiate(own: slice) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = fa_ops.attention(*leaves, starts[own], lens[own])
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))

    first = differentiate(slice(None))
    for repeat in range(20):
        assert_same_bits(differentiate(slice(None)), first, f"in repeat {repeat}")
    for seq in range(0, count, count // 8):
        rows = slice(seq * length, (seq + 1) * length)
        alone = differentiate(slice(seq, seq + 1))
        assert_same_bits(
            {name: t[rows] for name, t in alone.items()}, {name: t[rows] for name, t in first.items()}, f"of {seq}"
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: Case, record_property):
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False)
    record_property("accuracy_cases", 1)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.lens_q) > 1 and not case.has_sinks][::10], ids=str)
def test_batch_invariance(case: Case):
    properties.check_batch_invariance(fa_ops.attention, case, "cuda")


@pytest.mark.parametrize(
    "case", [case for case in CASES if len(case.lens_q) > 1 and case.dout != "expanded"][::20], ids=str
)
def test_nan_stays_in_its_sequence(case: Case):
    properties.check_nan_isolation(fa_ops.attention, case, "cuda")


@each_head_dim
@each_layout
def test_thousand_repeats(head_dim: int, is_padded: bool):
    inputs = case_of((1, 700, 0, 333, 64, 129, 1024, 2, 17), head_dim, heads_kv=4, is_padded=is_padded).build("cuda")
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, _ = inputs.call(fa_ops.attention, *leaves)

    def gradients() -> dict[str, Tensor]:
        found = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
        return dict(zip(("dq", "dk", "dv"), found, strict=True))

    first = gradients()
    for repeat in range(1, 1000):
        assert_same_bits(gradients(), first, f"in repeat {repeat}")


@each_head_dim
def test_thousands_of_launches(head_dim: int):
    """Other lengths each time; each fiftieth launch gives the bits that each sequence has alone."""
    rows, heads = 3000, 4
    q, k, v, dout = torch.randn(4, rows, heads, head_dim, dtype=torch.bfloat16, device="cuda")

    def differentiate(index: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = fa_ops.attention(*leaves, index[0], index[1], is_causal=is_causal)
        return torch.autograd.grad(out, leaves, dout)

    for launch, (starts, lens, is_causal, index) in enumerate(draw_launches(head_dim, rows, 3000)):
        together = differentiate(index, is_causal)
        if launch % 50 == 0:
            for n, (start, length) in enumerate(zip(starts, lens, strict=True)):
                own = slice(start, start + length)
                alone = differentiate(index[:, n : n + 1], is_causal)
                for found, expected in zip(together, alone, strict=True):
                    assert torch.equal(found[own], expected[own]), (launch, start, length)
    torch.cuda.synchronize()


@each_layout
def test_compiled(is_padded: bool, launches, tmp_path):
    inputs = case_of((40, 300, 129), 128, is_padded=is_padded, has_dlse=True).build("cuda")
    expected = evaluate(fa_ops.attention, inputs)
    launches.clear()
    with fresh_cache(dir=str(tmp_path)):
        torch.compiler.reset()
        found = evaluate(torch.compile(fa_ops.attention, fullgraph=True), inputs)
    assert launches
    assert_same_bits(found, expected, "when compiled")


def test_the_portable_kernels_are_others(monkeypatch, launches):
    inputs = case_of((2000,), 128, heads_kv=4).build("cuda")
    evaluate(fa_ops.attention, inputs)
    assert len(launches) == 1
    monkeypatch.setattr(tier, "TIER", "portable")
    evaluate(fa_ops.attention, inputs)
    assert len(launches) == 1
