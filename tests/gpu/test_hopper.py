"""The forward kernel for sm_90 on a GPU: results, races, hangs.

It does not run with FA_OPS_KERNEL=portable in the environment. A kernel that hangs cannot be interrupted, so a test
that takes too long ends its process. `examples/benchmarks/hopper_check.py` goes first, from the smallest case up.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import fa_ops
from fa_ops import hopper
from fa_ops.kernels import tier
from tests.support import properties
from tests.support.accuracy import check_case, evaluate, evaluate_forward
from tests.support.cases import Case
from tests.support.draw import Profile
from tests.support.hopper import count_launches, draw_launches, draw_many
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180, method="thread"),
    pytest.mark.skipif(tier.TIER == "portable", reason="FA_OPS_KERNEL is 'portable'"),
    pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for sm_90"),
]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = ((64, 64), (128, 128), (256, 256))
PROFILE = Profile(DTYPES, HEAD_DIMS, max_len=2000, max_rows_by_heads=40_000, max_seqs=8, feature_rate=0.0)
CASES = draw_many(PROFILE, 300)
each_head_dim = pytest.mark.parametrize("head_dim", [64, 128, 256])
each_layout = pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> Iterator[list]:
    """Holds an entry for each launch of the kernel, of which there must be one at least."""
    taken = count_launches(monkeypatch, hopper)
    yield taken
    assert taken


def case_of(lens: tuple[int, ...], head_dim: int, **changes) -> Case:
    return small_case(lens_q=lens, dtype=torch.bfloat16, head_dim=head_dim, value_dim=head_dim, **changes)


@each_head_dim
def test_smallest(head_dim: int):
    """One tile, one block, one head."""
    case = case_of((20,), head_dim, heads_kv=1, group_size=1)
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False, has_backward=False)


@each_head_dim
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_many_blocks_and_many_tiles(head_dim: int, is_causal: bool):
    """Each slot is used many times, by programs with several tiles each."""
    case = case_of((3000, 1, 1300), head_dim, heads_kv=4, is_causal=is_causal)
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False, has_backward=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: Case, record_property):
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False)
    record_property("accuracy_cases", 1)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.lens_q) > 1][::10], ids=str)
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
    first = evaluate_forward(fa_ops.attention, inputs)
    for repeat in range(1, 1000):
        assert_same_bits(evaluate_forward(fa_ops.attention, inputs), first, f"in repeat {repeat}")


@each_head_dim
def test_ten_thousand_launches(head_dim: int):
    """Other lengths each time; each hundredth launch gives the bits that each sequence has alone."""
    rows, heads = 3000, 4
    q, k, v = torch.randn(3, rows, heads, head_dim, dtype=torch.bfloat16, device="cuda")

    def attend(index: Tensor, is_causal: bool) -> Tensor:
        return fa_ops.attention(q, k, v, index[0], index[1], is_causal=is_causal)

    for launch, (starts, lens, is_causal, index) in enumerate(draw_launches(head_dim, rows, 10_000)):
        out = attend(index, is_causal)
        if launch % 100 == 0:
            for n, (start, length) in enumerate(zip(starts, lens, strict=True)):
                own = slice(start, start + length)
                alone = attend(index[:, n : n + 1], is_causal)
                assert torch.equal(out[own], alone[own]), (launch, start, length)
    torch.cuda.synchronize()


@each_layout
def test_cuda_graph_replays_with_other_lengths(is_padded: bool):
    """The list of tiles is made on the device."""
    inputs = case_of((40, 300, 0, 129), 128, is_padded=is_padded).build("cuda")
    q, k, v = (t.nan_to_num().clone() for t in (inputs.q, inputs.k, inputs.v))
    start, length = inputs.b_start_loc.clone(), inputs.b_seq_len.clone()

    def attend() -> tuple[Tensor, Tensor]:
        return fa_ops.attention(q, k, v, start, length, return_lse=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attend()
    for lens in ((40, 300, 0, 129), (1, 2, 3, 4), (0, 0, 0, 0), (300, 31, 100, 7)):
        length.copy_(torch.tensor(lens))
        start.copy_(torch.tensor([0] * 4 if is_padded else [sum(lens[:i]) for i in range(4)]))
        q.normal_()
        graph.replay()
        found, expected = (dict(zip(("out", "lse"), t, strict=True)) for t in (replayed, attend()))
        assert_same_bits(found, expected, f"between a replayed graph and eager for {lens}")


@each_layout
def test_compiled(is_padded: bool, launches, tmp_path):
    inputs = case_of((40, 300, 129), 128, is_padded=is_padded).build("cuda")
    expected = evaluate(fa_ops.attention, inputs)
    launches.clear()
    with fresh_cache(dir=str(tmp_path)):
        torch.compiler.reset()
        found = evaluate(torch.compile(fa_ops.attention, fullgraph=True), inputs)
    assert launches
    assert_same_bits(found, expected, "when compiled")


def test_the_portable_kernel_is_another(monkeypatch):
    """Else all of the above would compare it with itself: two orders of summing do not agree in every bit."""
    inputs = case_of((2000,), 128, heads_kv=4).build("cuda")
    found = evaluate_forward(fa_ops.attention, inputs)
    monkeypatch.setattr(tier, "TIER", "portable")
    other = evaluate_forward(fa_ops.attention, inputs)
    assert not torch.equal(found["out"], other["out"])
