"""Skip-softmax on sm_90 in Python, as test_hopper.py does it: the oracle's own blocks, bit for bit, and the accuracy
rule on what is kept."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import pytest
import torch

import fa_ops
from fa_ops import hopper, hopper_sparse
from fa_ops.kernels import hopper_sparse as kernels
from fa_ops.kernels.configs import HOPPER_SPARSE_TILES
from tests.support.accuracy import AccuracyError, check_case, evaluate_forward
from tests.support.cases import Case
from tests.support.draw import Profile, dropped_share
from tests.support.gluon import EmulatedKernel, EmulationError
from tests.support.hopper import draw_sparse
from tests.support.memory import CanaryError
from tests.support.problems import op_arguments, small_case
from tests.support.properties import assert_same_bits
from tests.support.skip import oracle_bits

OP = torch.ops.modelopt.varlen_attention
PROGRAMS = 3
SEEDS = range(7000, 7060)
QUICK = (7003, 7013, 7016, 7020)  # padded and packed prefill of each head dimension, few heads


class BlocksError(AssertionError):
    """Other blocks than the oracle's."""


@functools.cache
def drawn(seed: int) -> Case:
    head_dim = (64, 128, 64, 256)[seed % 4]
    dtypes = (torch.bfloat16, torch.float16)
    profile = Profile(dtypes, ((head_dim, head_dim),), max_len=900, max_rows_by_heads=10_000, max_seqs=3)
    return draw_sparse(profile, seed)


def sparse_case(**changes) -> Case:
    head_dim = changes.get("head_dim", 64)
    options = {
        "dtype": torch.bfloat16, "head_dim": head_dim, "value_dim": head_dim, "heads_kv": 1, "skip_share": 0.5,
        "skip_block": hopper.SKIP_BLOCKS[head_dim][0],
    }  # fmt: skip
    return small_case(**(options | changes))


@pytest.fixture
def launches(monkeypatch) -> list:
    """Calls of the op run the kernel here; holds the arguments of each launch."""
    taken = []

    def forward(*args):
        taken.append(args)
        return hopper_sparse.launch(*args)

    monkeypatch.setattr(hopper, "refusal", hopper.unsupported)
    monkeypatch.setattr(hopper_sparse, "forward", forward)
    monkeypatch.setattr(hopper_sparse, "multi_processors", lambda device: PROGRAMS)
    monkeypatch.setattr(
        kernels, "hopper_sparse_forward_kernel", EmulatedKernel(kernels, "hopper_sparse_forward_kernel")
    )
    return taken


def check(case: Case, has_backward: bool = False) -> None:
    inputs = case.build()
    *_, bits, counts = OP(*op_arguments(inputs))
    for name, found, expected in zip(("block_bits", "counts"), (bits, counts), oracle_bits(inputs), strict=True):
        if not torch.equal(found, expected):
            raise BlocksError(f"{name}: {found.tolist()} came, expected {expected.tolist()}")
    check_case(fa_ops.attention, case, has_backward=has_backward)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SEEDS])
def test_blocks_and_accuracy(seed: int, launches):
    assert 0.1 <= dropped_share(drawn(seed).build()) <= 0.9
    check(drawn(seed))
    assert launches


@pytest.mark.slow
def test_there_are_enough_cases():
    cases = [drawn(seed) for seed in SEEDS]
    for is_covered in (
        lambda case: case.is_padded, lambda case: not case.is_padded, lambda case: not case.is_causal,
        lambda case: case.group_size > 1, lambda case: case.window_size[1] >= 0, lambda case: 1 in case.lens_q,
        lambda case: case.skip_form == "head", lambda case: case.lens_k is not None,
    ):  # fmt: skip
        assert sum(map(is_covered, cases)) >= 3


# Lengths around the tile of 128 rows, the block of 64 and the block of 128 keys.
EDGES = {
    "around_a_tile": ((127, 128, 129, 600), None),
    "around_a_warp_group": ((63, 64, 65, 193, 385), None),
    "more_keys": ((5, 0, 130), (700, 128, 857)),
    "fewer_keys": ((300, 70, 529), (10, 0, 428)),
    "one_row": ((1, 1, 1), (1, 129, 4500)),
}


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["causal", "full"])
@pytest.mark.parametrize(("lens_q", "lens_k"), EDGES.values(), ids=EDGES.keys())
def test_edges(lens_q: tuple, lens_k: tuple | None, is_causal: bool, launches):
    check(sparse_case(lens_q=lens_q, lens_k=lens_k, is_causal=is_causal))
    assert launches


def test_words_of_bits(launches):
    """More blocks than fit into two words, each word written once."""
    check(sparse_case(lens_q=(70, 3), lens_k=(8400, 4096), group_size=1))
    assert launches


@pytest.mark.parametrize(
    "threshold", [1.0, 1e-30, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, torch.nan))]
)
def test_thresholds_that_drop_nothing(threshold: float, launches):
    """The result is that of dense attention."""
    case = sparse_case(lens_q=(300, 1, 65))
    inputs = dataclasses.replace(case.build(), skip_softmax_threshold=torch.tensor(threshold))
    found = evaluate_forward(fa_ops.attention, inputs)
    *_, counts = OP(*op_arguments(inputs))
    assert counts[0].sum() > 0
    assert counts[1].sum() == 0
    exact = inputs.call(fa_ops.reference.attention_reference, *(t.double() for t in (inputs.q, inputs.k, inputs.v)))
    torch.testing.assert_close(found["out"].double(), exact[0], rtol=0, atol=0.02)


def test_all_that_can_be_is_dropped(launches):
    """Also the last block of a tile, of which nothing is then on its way."""
    inputs = dataclasses.replace(sparse_case(lens_q=(500, 130)).build(), skip_softmax_threshold=torch.tensor(0.999999))
    *_, bits, counts = OP(*op_arguments(inputs))
    expected = oracle_bits(inputs)
    assert torch.equal(bits, expected[0])
    assert torch.equal(counts, expected[1])


def test_with_gradients(launches):
    check(sparse_case(lens_q=(300, 3), dtype=torch.float16), has_backward=True)
    assert launches


def test_values_of_dropped_blocks_are_not_read(launches):
    """Not even multiplied by 0."""
    case = sparse_case(lens_q=(64,), lens_k=(1000,), is_causal=False, group_size=1)
    inputs = case.build()
    clean = evaluate_forward(fa_ops.attention, inputs)
    kept = oracle_bits(inputs)[0].flatten()
    dropped = [block for block in range(8) if not kept[0] >> block & 1]
    assert dropped
    for block in dropped:
        inputs.v[block * 128 : (block + 1) * 128] = torch.nan
    assert_same_bits(evaluate_forward(fa_ops.attention, inputs), clean, "for NaN among values that are dropped")


@pytest.mark.parametrize("stages", [(2, 2), (4, 3)])
def test_values_that_nobody_wants_are_not_copied(stages: tuple[int, int], monkeypatch, launches):
    """Runs of blocks that are dropped, and single ones; other numbers of slots."""
    tile = HOPPER_SPARSE_TILES[64]._replace(k_stages=stages[0], v_stages=stages[1])
    monkeypatch.setitem(HOPPER_SPARSE_TILES, 64, tile)
    case = sparse_case(lens_q=(128,), lens_k=(5000,), is_causal=False, group_size=1, skip_share=0.8)
    check(case)
    visited = 40
    bits = oracle_bits(case.build())[0]
    kept_by_any = sum(bool((bits[0, :2, n // 32] >> n % 32 & 1).any()) for n in range(visited))
    _, keys, values, _ = kernels.hopper_sparse_forward_kernel.copies
    assert keys == visited
    assert kept_by_any <= values < (visited + kept_by_any) / 2


def test_repeats_and_any_number_of_programs(monkeypatch, launches):
    inputs = sparse_case(lens_q=(600, 150), heads_kv=2).build()
    expected = evaluate_forward(fa_ops.attention, inputs)
    monkeypatch.setattr(hopper, "heads_at_once", lambda *_: 1)
    for seed, programs in enumerate((1, 2, 7), 1):
        monkeypatch.setattr(hopper_sparse, "multi_processors", lambda device, n=programs: n)
        monkeypatch.setattr(kernels.hopper_sparse_forward_kernel, "seed", seed)
        assert_same_bits(evaluate_forward(fa_ops.attention, inputs), expected, f"with {programs} programs")


# Changes to the kernel's source, each of which must be found.
RELEASE = "mbarrier.arrive(v_empty.index((blocks - 1) % V_STAGES))\n"
WAIT = "acc, p = warpgroup_mma_wait(0, deps=[product, p])\n"
FAULTS = {
    "a_dropped_block_keeps_its_v": ("                    mbarrier.arrive(v_empty.index(slot_v))\n", ""),
    "a_dropped_block_counts": (
        "            if is_kept:\n                acc",
        "            if True:\n                acc",
    ),
    "v_is_released_before_its_use": (
        f"            {WAIT}            {RELEASE}",
        f"            {RELEASE}            {WAIT}",
    ),
    "v_of_the_last_block_is_not_released": (
        "        mbarrier.arrive(v_empty.index(slot))\n        blocks",
        "        blocks",
    ),
    "the_last_block_is_always_kept": ("if is_kept:\n            acc = warp", "if True:\n            acc = warp"),
    "the_producer_does_not_wait_for_the_decision": (
        "                        mbarrier.wait(k_empty.index(slot), (block // K_STAGES) & 1)\n",
        "",
    ),
    "one_warp_group_decides_for_both": ("is_wanted | _is_kept", "_is_kept"),
    "k_is_released_before_its_use": (
        "            s = warpgroup_mma_wait(1, deps=[scores])\n",
        "            mbarrier.arrive(k_empty.index(slot_k))\n            s = warpgroup_mma_wait(1, deps=[scores])\n",
    ),
    "a_tile_in_the_wrong_slot": ("    slot = tiles % 2\n    tile_smem", "    slot = (tiles + 1) % 2\n    tile_smem"),
    "another_tile_is_taken": ("gl.max(tile_smem.index(slot)", "gl.max(tile_smem.index(1 - slot)"),
    "a_tile_is_taken_twice": (
        "_take_number(next_ptr, num_tiles, ",
        '_locate(gl.atomic_add(next_ptr, 1, sem="relaxed"), num_tiles, ',
    ),
    "nothing_is_masked": ("    if block >= num_full:\n", "    if False:\n"),
    "blocks_in_another_order": ("visit(step, num_blocks, VISIT_ORDER)", "visit(step, num_blocks, 3)"),
    "a_segment_too_late": ("segment = (n0 + BLOCK_N) //", "segment = n0 //"),
    "rows_behind_the_end_vote": ("s_max, offs_m, n0, len_q", "s_max, offs_m - ROWS, n0, len_q"),
    "a_block_too_many_is_counted": ("(end + BLOCK_N - 1) // BLOCK_N", "(end + BLOCK_N) // BLOCK_N"),
    "out_is_not_waited_for": ("    if HEAD_DIM <= 128:\n        tma.store_wait(0)\n", ""),
    "a_word_is_not_emptied": ("        word = 0\n    return", "    return"),
}


LENGTHY = ("a_segment_too_late", "a_word_is_not_emptied")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(*change, id=name, marks=pytest.mark.slow if name in LENGTHY else ())
        for name, change in FAULTS.items()
    ],
)
def test_faults_are_found(old: str, new: str, monkeypatch, tmp_path, launches):
    source = Path(kernels.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "faulty_hopper_sparse.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_hopper_sparse", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    emulated = EmulatedKernel(faulty, "hopper_sparse_forward_kernel")
    monkeypatch.setattr(kernels, "hopper_sparse_forward_kernel", emulated)
    monkeypatch.setattr("tests.support.gluon.HANG_SECONDS", 1.0)
    monkeypatch.setattr("tests.support.accuracy.DRAWS", 1)
    lens_k = (5500, 5500) if "word" in tmp_path.name else (2900, 1100)
    cases = (
        sparse_case(lens_q=(700, 85), dtype=torch.float16),
        sparse_case(lens_q=(1, 90), lens_k=lens_k, dtype=torch.float16, skip_share=0.8),
    )
    with pytest.raises((AccuracyError, BlocksError, CanaryError, EmulationError)):
        _ = [check(case) for case in cases]
    assert launches
