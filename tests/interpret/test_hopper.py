"""The forward for sm_90 in Python: its list of tiles in Triton's interpreter, its Gluon kernel in an emulator of
barriers, asynchronous copies and products of matrices. That one knows bfloat16."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

import fa_ops
from fa_ops import hopper
from fa_ops.kernels import hopper as kernels
from fa_ops.kernels import tiles
from fa_ops.kernels.configs import HOPPER_TILES, HopperTile
from fa_ops_meta import outputs
from tests.support.accuracy import AccuracyError, check_case, evaluate_forward
from tests.support.cases import Case
from tests.support.draw import Profile
from tests.support.gluon import EmulatedKernel, EmulationError
from tests.support.hopper import draw_many, draw_supported
from tests.support.memory import CanaryError
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits

PROFILE = Profile(
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (128, 128), (256, 256)),
    max_len=450,
    max_rows_by_heads=900,
    max_seqs=4,
    feature_rate=0.0,
)
PROGRAMS = 3


CASES = draw_many(PROFILE, 240)


@pytest.fixture
def launches(monkeypatch) -> list:
    """Calls of the op run the kernel here; holds the arguments of each launch."""
    taken = []

    def forward(*args):
        taken.append(args)
        return hopper.launch(*args)

    monkeypatch.setattr(hopper, "refusal", hopper.unsupported)
    monkeypatch.setattr(hopper, "forward", forward)
    monkeypatch.setattr(hopper, "multi_processors", lambda device: PROGRAMS)
    emulated = EmulatedKernel(kernels, "hopper_forward_kernel")
    monkeypatch.setattr(kernels, "hopper_forward_kernel", emulated)
    return taken


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if n % 24 else (), id=str(case)) for n, case in enumerate(CASES)]
)
def test_accuracy(case: Case, launches):
    check_case(fa_ops.attention, case, has_backward=False)
    assert launches


def test_there_are_enough_cases():
    quick = CASES[::12]
    assert {case.head_dim for case in quick} == {64, 128, 256}
    assert {case.dtype for case in quick} == {torch.bfloat16, torch.float16}
    assert {case.is_padded for case in quick} == {case.is_causal for case in quick} == {True, False}
    assert {case.memory for case in quick} == {"contiguous", "head_major", "fused_qkv"}
    assert sum(case.window_size != (-1, -1) for case in quick) >= 4


# Lengths around the tile of 128 rows and the block of 128 keys, of 64 at D 256.
EDGES = {
    "around_a_tile": ((127, 128, 129, 1), None),
    "around_a_warp_group": ((63, 64, 65, 191, 192, 193), None),
    "more_keys": ((5, 0, 130), (300, 128, 257)),
    "fewer_keys": ((300, 70, 129), (10, 0, 128)),
    "one_row": ((1, 1, 1), (1, 128, 385)),
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("lens_q", "lens_k"), EDGES.values(), ids=EDGES.keys())
def test_edges(lens_q: tuple, lens_k: tuple | None, is_causal: bool, launches):
    case = small_case(
        lens_q=lens_q, lens_k=lens_k, is_causal=is_causal, dtype=torch.bfloat16, head_dim=64, value_dim=64, heads_kv=1
    )
    check_case(fa_ops.attention, case, has_backward=False)
    assert launches


@pytest.mark.parametrize("programs", [1, 2])
def test_tiles_without_blocks_count_no_turn(programs: int, monkeypatch, launches):
    """Three warp groups take turns at a tile's blocks but its first; rows of padding, and sequences with holes in
    their keys, are tiles without any."""
    monkeypatch.setattr(hopper, "multi_processors", lambda device: programs)
    case = small_case(
        lens_q=(29, 1, 300, 1), lens_k=(21, 255, 300, 300), is_padded=True, is_causal=False, dtype=torch.bfloat16,
        head_dim=64, value_dim=64, heads_kv=1,
    )  # fmt: skip
    check_case(fa_ops.attention, case, has_backward=False)
    assert launches


def test_the_log_says_which_kernel_runs(caplog, request):
    inputs = small_case(dtype=torch.float16, head_dim=64, value_dim=64).build()
    with caplog.at_level(logging.DEBUG, "fa_ops.ops"):
        inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
        request.getfixturevalue("launches")
        inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
        inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v, softcap=2.0)
    assert caplog.messages == [
        "varlen_attention: forward kernel, since cpu is not of sm_90",
        "varlen_attention: sm_90 kernel",
        "varlen_attention: forward kernel, since softcap",
    ]


def test_with_gradients(launches):
    check_case(fa_ops.attention, small_case(lens_q=(70, 3), dtype=torch.float16, head_dim=64, value_dim=64, heads_kv=1))
    assert launches


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_nan_stays_in_its_sequence(is_padded: bool, launches):
    """A block that crosses a sequence's end must not bring the next one's NaN to the matrix products."""
    case = small_case(lens_q=(40, 130, 9), dtype=torch.float16, head_dim=64, value_dim=64, is_padded=is_padded)
    clean = evaluate_forward(fa_ops.attention, case.build())
    for tainted in ("q", "k", "v"):
        inputs = case.build()
        rows = (1,) if is_padded else (slice(40, 170),)
        getattr(inputs, tainted)[rows] = torch.nan
        found = evaluate_forward(fa_ops.attention, inputs)
        assert found["out"][rows].isnan().any()
        keep = torch.ones(clean["out"].shape[:-2], dtype=torch.bool)
        keep[rows] = False
        assert_same_bits(
            {"out": found["out"][keep], "lse": found["lse"].transpose(-1, -2)[keep]},
            {"out": clean["out"][keep], "lse": clean["lse"].transpose(-1, -2)[keep]},
            f"for NaN in another sequence's {tainted}",
        )


def test_repeats_and_any_number_of_programs(monkeypatch, launches):
    """Copies arrive in another order each time; the bits are the same."""
    inputs = small_case(lens_q=(300, 150), dtype=torch.float16, head_dim=64, value_dim=64).build()
    expected = evaluate_forward(fa_ops.attention, inputs)
    for seed, programs in enumerate((1, 2, 7), 1):
        monkeypatch.setattr(hopper, "multi_processors", lambda device, n=programs: n)
        monkeypatch.setattr(kernels.hopper_forward_kernel, "seed", seed)
        found = evaluate_forward(fa_ops.attention, inputs)
        assert_same_bits(found, expected, f"with {programs} programs")


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_tiles_in_any_order(heads_at_once: int, monkeypatch, launches):
    """In parts of the list, and some heads after others; the bits are the same."""
    inputs = small_case(
        lens_q=(600, 150, 400), dtype=torch.float16, head_dim=64, value_dim=64, heads_kv=2, group_size=2
    ).build()
    expected = evaluate_forward(fa_ops.attention, inputs)
    monkeypatch.setattr(hopper, "heads_at_once", lambda *_: heads_at_once)
    monkeypatch.setattr(kernels, "SMALLEST_PART", 2)
    assert_same_bits(evaluate_forward(fa_ops.attention, inputs), expected, f"with {heads_at_once} key heads at once")


@pytest.mark.parametrize("tile", [HopperTile(64, 1, 2, 240, 24), HopperTile(32, 3, 3, 160, 32)], ids=str)
def test_other_tiles(tile: HopperTile, monkeypatch, launches):
    monkeypatch.setitem(HOPPER_TILES, 64, tile)
    case = small_case(lens_q=(250, 65), dtype=torch.float16, head_dim=64, value_dim=64, heads_kv=1)
    check_case(fa_ops.attention, case, has_backward=False)
    assert launches


# Changes to the kernel's source, each of which must be found.
FAULTS = {
    "v_is_released_before_its_use": (
        "        acc, p = warpgroup_mma_wait(0, deps=[product, p])\n        mbarrier.arrive(v_empty.index(slot_v))\n",
        "        mbarrier.arrive(v_empty.index(slot_v))\n        acc, p = warpgroup_mma_wait(0, deps=[product, p])\n",
    ),
    "v_is_never_released": (
        " acc, p = warpgroup_mma_wait(0, deps=[product, p])\n        mbarrier.arrive(v_empty.index(slot_v))\n",
        " acc, p = warpgroup_mma_wait(0, deps=[product, p])\n",
    ),
    "v_is_released_twice": (
        " acc, p = warpgroup_mma_wait(0, deps=[product, p])\n",
        " acc, p = warpgroup_mma_wait(0, deps=[product, p])\n        mbarrier.arrive(v_empty.index(slot_v))\n",
    ),
    "a_wrong_phase": (
        "wait(v_full.index(slot_v), (blocks // STAGES) & 1)", "wait(v_full.index(slot_v), ((blocks // STAGES) & 1) ^ 1)"
    ),
    "the_producer_does_not_wait": ("            mbarrier.wait(v_empty.index(slot), phase_before)\n", ""),
    "q_is_released_early": (
        "        tiles += 1\n        if num_blocks",
        "        tiles += 1\n        mbarrier.arrive(q_empty.index(own))\n        if num_blocks",
    ),
    "q_always_has_the_same_place": ("            own = slot * CONSUMERS + c\n", "            own = c\n"),
    "a_row_behind_the_end_is_read": (
        "end, head, RAGGED_ROWS - length + row, 0], full", "end + 1, head, RAGGED_ROWS - 1 - length + row, 0], full"
    ),
    "a_row_behind_the_end_is_written": (
        "end, head, RAGGED_ROWS - length + row, 0], smem)", "end + 1, head, RAGGED_ROWS - 1 - length + row, 0], smem)"
    ),
    "out_is_overwritten_while_it_is_copied": ("    tma.store_wait(0)\n    _rows", "    _rows"),
    "out_is_not_waited_for": ("    if HEAD_DIM <= 128:\n        tma.store_wait(0)\n", ""),
    "the_sum_is_not_rescaled": ("acc = acc * _column(alpha, out_layout)", "acc = acc * 1.0"),
    "the_next_tile_is_told_too_late": (
        "next_smem.index(slot).store(gl.full([1], t_next, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))", "pass"
    ),
    "nobody_takes_turns": ("        mbarrier.arrive(turn.index((CONSUMER + 1) % CONSUMERS))\n", "        pass\n"),
    "nothing_is_masked": ("    if MASKED:\n        offs_n", "    if False:\n        offs_n"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_found(old: str, new: str, monkeypatch, tmp_path, launches):
    source = Path(kernels.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "faulty_hopper.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_hopper", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    monkeypatch.setattr(kernels, "hopper_forward_kernel", EmulatedKernel(faulty, "hopper_forward_kernel"))
    monkeypatch.setattr("tests.support.gluon.HANG_SECONDS", 1.0)
    monkeypatch.setattr("tests.support.accuracy.DRAWS", 1)
    case = small_case(lens_q=(700, 65), dtype=torch.float16, head_dim=64, value_dim=64, heads_kv=1)
    with pytest.raises(AssertionError) as caught:
        check_case(fa_ops.attention, case, has_backward=False)
    assert launches
    assert isinstance(caught.value, (AccuracyError, CanaryError, EmulationError))


@pytest.mark.parametrize("seed", range(24))
def test_tile_list(seed: int):
    """Every tile once; its blocks hold each key that a row of it sees; those called whole need no mask."""
    case = draw_supported(PROFILE, seed)
    inputs = case.build()
    start_k, len_k = inputs.b_start_loc_k, inputs.b_seq_len_k
    start_k = inputs.b_start_loc if start_k is None else start_k
    len_k = inputs.b_seq_len if len_k is None else len_k
    left, right = case.window_size
    right = 0 if case.is_causal else right
    block_m, block_n = 128, 64
    if not case.lens_q or 0 in (inputs.q.shape[-3], inputs.k.shape[-3]):
        return
    listing = hopper.plan_tile_list(inputs.q, inputs.k, inputs.v, inputs.b_seq_len, None, left, right, block_m, block_n)
    out_lse = outputs.empty_forward(inputs.q, inputs.v)
    records = hopper.list_tiles(listing, *out_lse, inputs.b_start_loc, inputs.b_seq_len, start_k, len_k, None)
    found = []
    rows_q = inputs.q.shape[-3]
    for record in records[: int(records[-1, 0])].tolist():
        tile = dict(zip(tiles.FIELDS, record, strict=False))
        counts = tile["num_left"], tile["num_full"], tile["num_right"]
        if tile["m0"] >= tile["len_q"]:
            assert sum(counts) == 0
            continue
        first = tile["row"] - tile["m0"]
        assert tile["batch_row"] == (first // rows_q * rows_q if case.is_padded else 0)
        found.append((first, tile["m0"]))
        rows = torch.arange(tile["m0"], min(tile["m0"] + block_m, tile["len_q"]))
        keys = torch.arange(tile["len_k"])
        position = rows[:, None] + tile["len_k"] - tile["len_q"]
        sees = torch.ones(len(rows), len(keys), dtype=torch.bool)
        if left >= 0:
            sees &= keys >= position - left
        if right >= 0:
            sees &= keys <= position + right
        end = tile["begin"] + sum(counts) * block_n
        assert not sees[:, : tile["begin"]].any()
        assert not sees[:, max(end, 0) :].any()
        whole = tile["begin"] + counts[0] * block_n
        assert sees[:, whole : whole + counts[1] * block_n].all()
        assert whole + counts[1] * block_n <= max(tile["len_k"], whole)
    starts = inputs.b_start_loc.tolist()
    expected = [
        ((seq * rows_q if case.is_padded else 0) + starts[seq], m0)
        for seq, n in enumerate(case.lens_q) for m0 in range(0, n, block_m)
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
