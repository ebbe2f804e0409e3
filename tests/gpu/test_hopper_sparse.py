"""Skip-softmax on sm_90 on a GPU: the oracle's blocks bit for bit, results, races, hangs.

It does not run with FA_OPS_KERNEL=portable in the environment. A kernel that hangs cannot be interrupted, so a test
that takes too long ends its process.
"""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch._inductor.utils import fresh_cache

import fa_ops
from fa_ops import hopper, hopper_sparse
from fa_ops.kernels import tier
from tests.support import properties
from tests.support.accuracy import check_case, evaluate, evaluate_forward
from tests.support.cases import Case
from tests.support.draw import Profile
from tests.support.hopper import count_launches, draw_launches, draw_sparse
from tests.support.problems import op_arguments, small_case
from tests.support.properties import assert_same_bits
from tests.support.skip import oracle_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180, method="thread"),
    pytest.mark.skipif(tier.TIER == "portable", reason="FA_OPS_KERNEL is 'portable'"),
    pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for sm_90"),
]

OP = torch.ops.modelopt.varlen_attention
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
SEEDS = range(9000, 9090)
each_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> Iterator[list]:
    """Holds an entry for each launch of the kernel, of which there must be one at least."""
    taken = count_launches(monkeypatch, hopper_sparse)
    yield taken
    assert taken


@functools.cache
def drawn(seed: int) -> Case:
    head_dim = HEAD_DIMS[seed % 3]
    profile = Profile(DTYPES, ((head_dim, head_dim),), max_len=2000, max_rows_by_heads=100_000, max_seqs=6)
    return draw_sparse(profile, seed)


def sparse_case(head_dim: int, **changes) -> Case:
    options = {
        "dtype": torch.bfloat16, "head_dim": head_dim, "value_dim": head_dim, "skip_share": 0.5,
        "skip_block": hopper.SKIP_BLOCKS[head_dim][0],
    }  # fmt: skip
    return small_case(**(options | changes))


def check(case: Case, has_backward: bool = True) -> None:
    inputs = case.build("cuda")
    *_, bits, counts = OP(*op_arguments(inputs))
    expected_bits, expected_counts = oracle_bits(inputs)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(bits, expected_bits)
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False, has_backward=has_backward)


@each_head_dim
def test_smallest(head_dim: int):
    check(sparse_case(head_dim, lens_q=(20,), heads_kv=1, group_size=1), has_backward=False)


@each_head_dim
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_many_blocks_and_many_tiles(head_dim: int, is_causal: bool):
    check(sparse_case(head_dim, lens_q=(3000, 1, 1300), heads_kv=4, is_causal=is_causal), has_backward=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_and_accuracy(seed: int, record_property):
    check(drawn(seed))
    record_property("accuracy_cases", 1)


@each_head_dim
def test_segments_of_one_row(head_dim: int):
    case = sparse_case(head_dim, lens_q=(1, 1, 70), lens_k=(5000, 130, 9000), group_size=4, skip_share=0.7)
    check(case, has_backward=False)


@pytest.mark.parametrize("seed", SEEDS[::10])
def test_batch_invariance(seed: int):
    properties.check_batch_invariance(fa_ops.attention, drawn(seed), "cuda")


@each_head_dim
@pytest.mark.parametrize("share", [0.1, 0.85])
def test_thousand_repeats(head_dim: int, share: float):
    """Programs take other tiles each time."""
    case = sparse_case(head_dim, lens_q=(1, 700, 0, 333, 64, 129, 1024, 2, 17), heads_kv=4, skip_share=share)
    arguments = op_arguments(case.build("cuda"))
    names = ("out", "lse", "block_bits", "counts")
    first = dict(zip(names, OP(*arguments), strict=True))
    for repeat in range(1, 1000):
        assert_same_bits(dict(zip(names, OP(*arguments), strict=True)), first, f"in repeat {repeat}")


@each_head_dim
def test_launches_of_other_lengths(head_dim: int):
    """A hang would show here. Each hundredth launch gives the bits that each sequence has alone."""
    rows, (block_q, block_k) = 3000, hopper.SKIP_BLOCKS[head_dim][0]
    q, k, v = torch.randn(3, rows, 4, head_dim, dtype=torch.bfloat16, device="cuda")
    threshold = torch.full((), 0.5, device="cuda")

    def attend(index: torch.Tensor, is_causal: bool) -> torch.Tensor:
        return fa_ops.attention(
            2 * q, k, v, index[0], index[1], is_causal=is_causal,
            skip_softmax_threshold=threshold, skip_softmax_block=(block_q, block_k),
        )  # fmt: skip

    for launch, (starts, lens, is_causal, index) in enumerate(draw_launches(head_dim, rows, 3000)):
        out = attend(index, is_causal)
        if launch % 100 == 0:
            for n, (start, length) in enumerate(zip(starts, lens, strict=True)):
                own = slice(start, start + length)
                alone = attend(index[:, n : n + 1], is_causal)
                assert torch.equal(out[own], alone[own]), (launch, start, length)
    torch.cuda.synchronize()


def test_cuda_graph_replays_with_other_thresholds():
    """The threshold, the list of tiles and the count of those taken lie on the device."""
    inputs = sparse_case(128, lens_q=(600, 300, 0, 1029), skip_form="head").build("cuda")
    arguments = op_arguments(inputs)
    threshold = inputs.skip_softmax_threshold
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        OP(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = OP(*arguments)
    names = ("out", "lse", "block_bits", "counts")
    for factor in (1.0, 0.0, 0.5, 1.0):
        threshold.mul_(factor)
        graph.replay()
        found, expected = (dict(zip(names, t, strict=True)) for t in (replayed, OP(*arguments)))
        assert_same_bits(found, expected, f"between a replayed graph and eager for a factor of {factor}")


def test_compiled(launches, tmp_path):
    inputs = sparse_case(128, lens_q=(440, 300, 129)).build("cuda")
    expected = evaluate(fa_ops.attention, inputs)
    launches.clear()
    with fresh_cache(dir=str(tmp_path)):
        torch.compiler.reset()
        found = evaluate(torch.compile(fa_ops.attention, fullgraph=True), inputs)
    assert launches
    assert_same_bits(found, expected, "when compiled")


def test_a_threshold_that_drops_nothing_gives_dense_attention():
    inputs = sparse_case(128, lens_q=(2000,), skip_share=0.5).build("cuda")
    inputs.skip_softmax_threshold = torch.tensor(1.0, device="cuda")
    found = evaluate_forward(fa_ops.attention, inputs)
    inputs.skip_softmax_threshold = None
    dense = evaluate_forward(fa_ops.attention, inputs)
    torch.testing.assert_close(found["lse"], dense["lse"], rtol=0, atol=1e-4)
