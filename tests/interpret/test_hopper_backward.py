"""The backward for sm_90 in Python, as the forward in test_hopper.py."""

import dataclasses
import importlib.util
import logging
from pathlib import Path

import pytest
import torch

import fa_ops
from fa_ops import hopper, hopper_backward
from fa_ops.kernels import backward_tiles
from fa_ops.kernels import hopper as forward_kernels
from fa_ops.kernels import hopper_backward as kernels
from fa_ops.kernels.configs import HOPPER_BACKWARD_TILES, HopperTile
from tests.support.accuracy import AccuracyError, check_case, evaluate
from tests.support.cases import Case
from tests.support.draw import Profile
from tests.support.gluon import EmulatedKernel, EmulationError
from tests.support.hopper import draw_many_backward
from tests.support.memory import CanaryError
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits, check_nan_isolation

PROFILE = Profile(
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (128, 128)),
    max_len=450,
    max_rows_by_heads=900,
    max_seqs=4,
    feature_rate=0.0,
)
PROGRAMS = 3
KERNELS = ("hopper_dq_kernel", "hopper_dkv_kernel")
CASES = draw_many_backward(PROFILE, 120)
HALF = {"dtype": torch.float16, "head_dim": 64, "value_dim": 64}


@pytest.fixture
def launches(monkeypatch) -> list:
    """Backward calls run the kernels here; holds the arguments of each launch."""
    taken = []

    def backward(*args):
        taken.append(args)
        return hopper_backward.launch(*args)

    monkeypatch.setattr(hopper_backward, "refusal", hopper_backward.unsupported)
    monkeypatch.setattr(hopper_backward, "backward", backward)
    monkeypatch.setattr(hopper_backward, "multi_processors", lambda device: PROGRAMS)
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, EmulatedKernel(kernels, name))
    # the interpreter's products of matrices do not know bfloat16
    monkeypatch.setattr(hopper, "refusal", hopper.unsupported)
    monkeypatch.setattr(hopper, "forward", hopper.launch)
    monkeypatch.setattr(
        forward_kernels, "hopper_forward_kernel", EmulatedKernel(forward_kernels, "hopper_forward_kernel")
    )
    return taken


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if n % 24 else (), id=str(case)) for n, case in enumerate(CASES)]
)
def test_accuracy(case: Case, launches):
    check_case(fa_ops.attention, case)
    assert launches


def test_there_are_enough_cases():
    quick = CASES[::24]
    assert {case.head_dim for case in quick} == {64, 128}
    assert {case.dtype for case in quick} == {torch.bfloat16, torch.float16}
    assert {case.is_padded for case in quick} == {case.is_causal for case in quick} == {True, False}
    assert {case.memory for case in CASES} == {"contiguous", "head_major", "fused_qkv"}
    assert {case.dout for case in CASES} == {"dense", "expanded", "transposed"}
    assert sum(case.has_sinks for case in CASES) >= 10
    assert sum(case.has_dlse for case in CASES) >= 30
    assert {case.key_mask for case in CASES} == {None, "random", "hole", "all"}
    assert any(window_right > 0 for _, window_right in (case.window_size for case in CASES))


# Lengths around the tiles of 128 rows and the blocks of 128 and, at D 128, of 64.
EDGES = {
    "around_a_tile": ((127, 128, 129, 1), None),
    "around_a_warp_group": ((63, 64, 65, 191, 192, 193), None),
    "more_keys": ((5, 0, 130), (300, 128, 257)),
    "fewer_keys": ((300, 70, 129), (10, 0, 128)),
    "one_row": ((1, 1, 1), (1, 128, 385)),
}


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("lens_q", "lens_k"),
    [
        pytest.param(*lens, marks=pytest.mark.slow if n % 2 else (), id=name)
        for n, (name, lens) in enumerate(EDGES.items())
    ],
)
def test_edges(lens_q: tuple, lens_k: tuple | None, is_causal: bool, launches):
    case = small_case(lens_q=lens_q, lens_k=lens_k, is_causal=is_causal, heads_kv=1, **HALF)
    check_case(fa_ops.attention, case)
    assert launches


@pytest.mark.parametrize("changes", [{}, {"lens_q": (90, 7), "lens_k": (60, 9)}], ids=["all_see", "some_see_a_sink"])
def test_sinks(changes: dict, launches):
    check_case(fa_ops.attention, small_case(has_sinks=True, has_dlse=True, **HALF | changes))
    assert launches


def test_window_right(launches):
    check_case(fa_ops.attention, small_case(lens_q=(150, 70), is_causal=False, window_size=(-1, 40), **HALF))
    assert launches


@pytest.mark.parametrize("right", [2**30, 2**31 - 1, 2**63 - 1])
def test_a_window_wider_than_any_sequence(right: int, launches):
    """On sm_90 and in the portable kernels: 32 bits hold what is added to it."""
    case = small_case(lens_q=(70, 7), lens_k=(90, 3), is_causal=False, heads_kv=1, **HALF)
    expected = evaluate(fa_ops.attention, case.build())
    wide = dataclasses.replace(case, window_size=(-1, right)).build()
    for sinks in ({}, {"softcap": 1e4}):
        found = evaluate(fa_ops.attention, wide, **sinks)
        for name, t in expected.items():
            torch.testing.assert_close(found[name], t, rtol=0, atol=0.02)
    assert len(launches) == 2


def test_the_log_says_which_kernels_run(caplog, launches, monkeypatch):
    inputs = small_case(**HALF).build()
    with caplog.at_level(logging.DEBUG, "fa_ops.ops"):
        evaluate(fa_ops.attention, inputs)
        evaluate(fa_ops.attention, inputs, softcap=2.0)
        monkeypatch.undo()
        evaluate(fa_ops.attention, inputs)
    assert [message for message in caplog.messages if "backward" in message] == [
        "varlen_attention_backward: sm_90 kernels",
        "varlen_attention_backward: portable kernels, since softcap",
        "varlen_attention_backward: portable kernels, since cpu is not of sm_90",
    ]


@pytest.mark.parametrize("is_padded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["packed", "padded"])
def test_nan_stays_in_its_sequence(is_padded: bool, launches):
    check_nan_isolation(fa_ops.attention, small_case(lens_q=(20, 70), is_padded=is_padded, heads_kv=1, **HALF))


def test_repeats_and_any_number_of_programs(monkeypatch, launches):
    """Copies arrive in another order each time, and heads are taken one after another; the bits are the same."""
    inputs = small_case(lens_q=(300, 50), heads_kv=2, **HALF).build()
    expected = evaluate(fa_ops.attention, inputs)
    monkeypatch.setattr(hopper, "heads_at_once", lambda *_: 1)
    for seed, programs in enumerate((1, 7), 1):
        monkeypatch.setattr(hopper_backward, "multi_processors", lambda device, n=programs: n)
        for name in KERNELS:
            monkeypatch.setattr(getattr(kernels, name), "seed", seed)
        assert_same_bits(evaluate(fa_ops.attention, inputs), expected, f"with {programs} programs")


@pytest.mark.parametrize(
    "tiles",
    [
        (HopperTile(64, 2, 2, 240, 24), HopperTile(64, 1, 2, 240, 24)),
        (HopperTile(32, 3, 3, 160, 32), HopperTile(32, 3, 3, 160, 32)),
    ],
    ids=["few_slots", "three_consumers"],
)
def test_other_tiles(tiles: tuple[HopperTile, HopperTile], monkeypatch, launches):
    monkeypatch.setitem(HOPPER_BACKWARD_TILES, 64, tiles)
    check_case(fa_ops.attention, small_case(lens_q=(250, 65), heads_kv=1, **HALF))
    assert launches


# Changes to the source of the kernels, each of which must be found.
FAULTS = {
    "keys_are_released_before_their_use": (
        "    dq, ds = warpgroup_mma_wait(0, deps=[product, ds])\n    mbarrier.arrive(empty.index(slot_before))\n",
        "    mbarrier.arrive(empty.index(slot_before))\n    dq, ds = warpgroup_mma_wait(0, deps=[product, ds])\n",
    ),
    "queries_are_released_before_their_use": (
        "    dv, dk, p_operand, ds = warpgroup_mma_wait(0, deps=[product_v, product_k, p_operand, ds])\n"
        "    mbarrier.arrive(empty.index(slot))\n",
        "    mbarrier.arrive(empty.index(slot))\n"
        "    dv, dk, p_operand, ds = warpgroup_mma_wait(0, deps=[product_v, product_k, p_operand, ds])\n",
    ),
    "queries_are_never_released": (
        "product_k, p_operand, ds])\n    mbarrier.arrive(empty.index(slot))\n", "product_k, p_operand, ds])\n"
    ),
    "queries_are_released_twice": (
        "product_k, p_operand, ds])\n", "product_k, p_operand, ds])\n    mbarrier.arrive(empty.index(slot))\n"
    ),
    "dp_is_not_waited_for": ("wait(NUM_BEHIND, deps=[dp])", "wait(NUM_BEHIND + 1, deps=[dp])"),
    "the_producer_of_keys_does_not_wait": (
        "                mbarrier.wait(empty.index(slot), ((blocks // STAGES) & 1) ^ 1)\n                _copy(k_desc",
        "                _copy(k_desc",
    ),
    "the_producer_of_queries_does_not_wait": (
        "                    mbarrier.wait(empty.index(slot), ((blocks // STAGES) & 1) ^ 1)\n", ""
    ),
    "own_rows_are_released_early": (
        "        tiles += 1\n        for _member",
        "        tiles += 1\n        mbarrier.arrive(own_empty.index(own))\n        for _member",
    ),
    "terms_of_another_head": ("[2 * head + term, row]", "[2 * (head + 1) + term, row]"),
    "keys_always_have_the_same_place": ("    return own\n", "    return 0\n"),
    "a_row_behind_the_end_of_queries_is_written": ("(dq_desc, end, len_q,", "(dq_desc, end + 1, len_q + 1,"),
    "a_row_behind_the_end_of_keys_is_written": ("(dv_desc, end, len_k,", "(dv_desc, end + 1, len_k + 1,"),
    "dk_is_not_scaled": ("dk * softmax_scale", "dk * 1.0"),
    "keys_are_not_masked": ("    if MASKED:\n        offs_n", "    if False:\n        offs_n"),
    "queries_are_not_masked": ("    if MASKED:\n        offs_m", "    if False:\n        offs_m"),
    "the_last_block_is_left_out": ("= gl.load(record_ptr + 5) + gl.load(record_ptr + 6)", "= gl.load(record_ptr + 5)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(*change, marks=pytest.mark.slow if n % 3 else (), id=name)
        for n, (name, change) in enumerate(FAULTS.items())
    ],
)
def test_faults_are_found(old: str, new: str, monkeypatch, tmp_path, launches):
    source = Path(kernels.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "faulty_backward.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_backward", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, EmulatedKernel(faulty, name))
    monkeypatch.setattr("tests.support.gluon.HANG_SECONDS", 1.0)
    monkeypatch.setattr("tests.support.accuracy.DRAWS", 1)
    monkeypatch.setitem(HOPPER_BACKWARD_TILES, 64, (HopperTile(64, 2, 2, 240, 24),) * 2)
    monkeypatch.setattr(hopper_backward, "multi_processors", lambda device: 1)
    with pytest.raises(AssertionError) as caught:
        check_case(fa_ops.attention, small_case(lens_q=(400, 65), heads_kv=1, **HALF))
    assert launches
    assert isinstance(caught.value, (AccuracyError, CanaryError, EmulationError))


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("case", CASES[:24], ids=str)
def test_tile_list(case: Case, of_keys: bool):
    """Every tile once; its blocks hold all that it sees; those called whole need no mask; no row of it is blind. None
    has blocks where keys have holes. Gradients are 0 in the rows of no tile with blocks, and not touched in others."""
    inputs = case.build()
    start_k, len_k = inputs.b_start_loc_k, inputs.b_seq_len_k
    start_k = inputs.b_start_loc if start_k is None else start_k
    len_k = inputs.b_seq_len if len_k is None else len_k
    right = 0 if case.is_causal else case.window_size[1]
    size, block, terms_block = 128, 32, 64
    if not case.lens_q or 0 in (inputs.q.shape[-3], inputs.k.shape[-3]):
        return
    listing = hopper_backward.plan_tile_list(
        inputs.q, inputs.q, inputs.k, inputs.v, inputs.b_seq_len, inputs.key_mask, right, terms_block, size, block,
        of_keys,
    )  # fmt: skip
    own = inputs.k if of_keys else inputs.q
    grads = [torch.full(own.shape, torch.nan, dtype=torch.float16) for _ in range(2)]
    records = hopper.list_tiles(listing, *grads, inputs.b_start_loc, inputs.b_seq_len, start_k, len_k, inputs.key_mask)
    found = []
    is_left = torch.zeros(own.shape[:-2].numel(), dtype=torch.bool)
    lens_k = case.lens_k or case.lens_q
    are_holey = [
        inputs.key_mask is not None and not inputs.key_mask[seq, start : start + n].all()
        for seq, (start, n) in enumerate(zip(start_k.tolist(), lens_k, strict=True))
    ]
    for record in records[: int(records[-1, 0])].tolist():
        tile = dict(zip(backward_tiles.FIELDS, record, strict=False))
        counts = tile["num_left"], tile["num_full"], tile["num_right"]
        rows, keys = tile["len_q"], tile["len_k"]
        if tile["first"] >= (keys if of_keys else rows):
            assert sum(counts) == 0
            continue
        found.append((tile["row"] - tile["first"], tile["first"]))
        if case.is_padded and are_holey[tile["row"] // own.shape[-3]]:
            assert sum(counts) == 0
            continue
        if sum(counts):
            is_left[tile["row"] : tile["row"] + min(size, (keys if of_keys else rows) - tile["first"])] = True
        position = torch.arange(rows)[:, None] + keys - rows
        sees = torch.arange(keys) <= position + right if right >= 0 else torch.ones(rows, keys, dtype=torch.bool)
        assert keys == 0 or sees.any(1).all()
        sees = (sees.T if of_keys else sees)[tile["first"] : tile["first"] + size]
        end = tile["begin"] + sum(counts) * block
        assert not sees[:, : tile["begin"]].any()
        assert not sees[:, max(end, 0) :].any()
        whole = tile["begin"] + counts[0] * block
        assert sees[:, whole : whole + counts[1] * block].all()
        assert whole + counts[1] * block <= max(sees.shape[1], whole)
        assert tile["terms"] % terms_block == 0
    lens = lens_k if of_keys else [
        max(min(rows, keys + right), 0) if right >= 0 else rows for rows, keys in zip(case.lens_q, lens_k, strict=True)
    ]  # fmt: skip
    starts, all_lens = (start_k, lens_k) if of_keys else (inputs.b_start_loc, case.lens_q)
    expected = [
        ((seq * own.shape[-3] if case.is_padded else 0) + int(starts[seq]) + all_lens[seq] - n, first)
        for seq, n in enumerate(lens) for first in range(0, n, size)
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    for grad in grads if of_keys else grads[:1]:
        rows = grad.flatten(0, -3)
        assert rows[is_left].isnan().all()
        assert (rows[~is_left] == 0).all()
