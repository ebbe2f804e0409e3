"""What calibration makes of its counts: from one length the shares of shorter and of longer ones."""

import math

import pytest
import torch
from torch import Tensor

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.calibration import CountRecorder, _curve
from fa_ops.sparsity.config import DEFAULT_TRIALS
from fa_ops.sparsity.counting import count_dropped, single_rows
from fa_ops.sparsity.curves import JUMP, MOST_THRESHOLD, Calibrated, ShareCurve
from fa_ops.sparsity.methods.base import DECODE
from fa_ops_meta.skip import DECODE_SEGMENT
from tests.sparsity.models import config_of, sharp_model

BLOCK = (16, 16)
LARGE_BLOCK = (64, 128)
HEADS, DIM = 4, 64
TARGETS = (0.2, 0.3, 0.5, 0.7)
TOLERANCE = 0.02


def local_attention(length: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """q and k (samples, length, heads, D) whose scores fall with the distance, and differ from text to text."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(length)[:, None] * 0.7 ** torch.arange(DIM // 4)  # a slower turn in each next pair
    turn = torch.cat([angles.cos(), angles.sin()], 1).expand(samples, HEADS, -1, -1).transpose(1, 2)
    content = torch.randn(2, samples, length, HEADS, DIM // 2, generator=generator)
    sharpness = torch.tensor([0.6, 0.8, 1.0, 1.3])[:, None] * 5
    q, k = (torch.cat([turn, 0.5 * part], -1) for part in content)
    return q * sharpness, k


def ranges(q: Tensor) -> dict[str, Tensor]:
    return {"b_start_loc": torch.zeros(len(q)).int(), "b_seq_len": torch.full((len(q),), q.shape[1])}


class Counting:
    """Of a method what a recorder asks for."""

    def calculate_sparsity(self, q, k, trials, arguments):
        return count_dropped(q, k, trials, BLOCK, **arguments)


@pytest.fixture(scope="module")
def curves() -> dict[str, ShareCurve]:
    recorder = CountRecorder(DEFAULT_TRIALS, BLOCK[0], 160)
    for seed in range(6):
        q, k = local_attention(256, 4, seed)
        recorder.record(Counting(), q, k, torch.full((4,), 256), False, ranges(q))
    return {phase: _curve(phase, recorder, (False, True)) for phase in ("prefill", "decode")}


def held_out_shares(phase: str, length: int, thresholds: list[float]) -> list[float]:
    """Of several λ, ascending. Decoding is at a key block's 16 last rows."""
    q, k = local_attention(length, 24, 1000 + length)
    calls = [(q, k, ranges(q), None)]
    if phase == "decode":
        calls = single_rows(q, k, ranges(q), 1 - (torch.arange(16) + 0.5) / length)
    counts = [count_dropped(*call[:2], tuple(thresholds), BLOCK, **call[2]) for call in calls]
    dropped = sum(own.dropped.sum((1, 2)) for own in counts)
    return (dropped / sum(own.visited.sum() for own in counts)).tolist()


@pytest.mark.parametrize("length", [128, 256, 512])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_shares_at_lengths_that_were_not_run(curves, phase, length):
    wanted = {Calibrated.of(curves[phase], target).threshold(length): target for target in TARGETS}
    achieved = held_out_shares(phase, length, sorted(wanted))
    reached = [wanted[threshold] for threshold in sorted(wanted) if threshold < MOST_THRESHOLD]
    assert len(reached) >= 2
    assert achieved[: len(reached)] == pytest.approx(reached, abs=TOLERANCE)


@pytest.fixture(scope="module")
def segmented() -> ShareCurve:
    """Of decoding alone, at rows of texts of two segments."""
    recorder = CountRecorder(DEFAULT_TRIALS, LARGE_BLOCK[0], 160)
    for seed in range(12):
        q, k = local_attention(2 * DECODE_SEGMENT, 2, seed)
        for rows, its_k, arguments, _ in single_rows(q, k, ranges(q), (torch.arange(160) + seed / 12) / 160):
            counts = count_dropped(rows, its_k, DEFAULT_TRIALS, LARGE_BLOCK, **arguments)
            recorder._add(DECODE, counts, arguments["b_seq_len_k"], True)
    return _curve("decode", recorder, (False, True))


@pytest.mark.parametrize("length", [1024, 2048, 3072, 4096, 8192, 16384])
def test_decoding_over_segments(segmented, length):
    """Half, once, twice and four times as long as the texts, where segments are full, and between: λ of the middle of a
    key block's rows."""
    wanted = {Calibrated.of(segmented, target).threshold(length - 64): target for target in (0.2, 0.3, 0.5)}
    q, k = local_attention(length, 12 * 4096 // length, 1000 + length)
    calls = single_rows(q, k, ranges(q), 1 - (torch.arange(16) + 0.5) * 8 / length)
    counts = [count_dropped(*call[:2], tuple(sorted(wanted)), LARGE_BLOCK, **call[2]) for call in calls]
    visited = sum(own.visited.sum() for own in counts)
    achieved = (sum(own.dropped.sum((1, 2)) for own in counts) / visited).tolist()
    tolerance = TOLERANCE if length <= 4 * DECODE_SEGMENT else 3 * TOLERANCE
    assert achieved == pytest.approx([wanted[threshold] for threshold in sorted(wanted)], abs=tolerance)


def test_a_segment_s_end_shows(segmented):
    """Before it the newest keys are compared with all others, behind it with few."""
    own = Calibrated.of(segmented, 0.3)
    assert own.threshold(2 * DECODE_SEGMENT + JUMP) > 2 * own.threshold(2 * DECODE_SEGMENT)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_length_matters(curves, phase):
    """λ of the length that was run misses at others."""
    threshold = Calibrated.of(curves[phase], 0.3).threshold(256)
    for length in (128, 512):
        assert held_out_shares(phase, length, [threshold]) != pytest.approx([0.3], abs=TOLERANCE)


def test_a_text_has_the_shorter_ones_in_it():
    """Its query blocks are exactly theirs, and a row is exactly a decoding step."""
    q, k = local_attention(200, 2, 0)
    whole = count_dropped(q, k, DEFAULT_TRIALS, BLOCK, **ranges(q))
    short = count_dropped(q[:, :96], k[:, :96], DEFAULT_TRIALS, BLOCK, **ranges(q[:, :96]))
    of_whole = whole.dropped.unflatten(-1, (2, -1))[..., : 96 // 16]
    assert torch.equal(of_whole, short.dropped.unflatten(-1, (2, -1)))
    assert 0 < short.dropped.sum() < short.visited.sum() * len(DEFAULT_TRIALS)
    positions = torch.tensor([0, 37, 199])
    for batch, (rows, its_k, arguments, sequence) in enumerate(single_rows(q, k, ranges(q), (positions + 0.5) / 200)):
        assert sequence.tolist() == [batch] * 3
        assert arguments["b_seq_len_k"].tolist() == (positions + 1).tolist()
        counts = count_dropped(rows, its_k, DEFAULT_TRIALS, BLOCK, **arguments).by_sequence()
        for number, position in enumerate(positions.tolist()):
            step = q[batch : batch + 1, position : position + 1]
            keys = {"b_start_loc_k": torch.zeros(1).int(), "b_seq_len_k": torch.tensor([position + 1])}
            its = count_dropped(step, k[batch : batch + 1], DEFAULT_TRIALS, BLOCK, **ranges(step), **keys).by_sequence()
            assert torch.equal(rows[number], step[0, 0])
            for ours, theirs in zip(counts, its, strict=True):
                assert torch.equal(ours[..., number, :], theirs[..., 0, :])


def test_tiles_and_rows_of_packed_sequences():
    """Sequences, one of them empty, with rows of none between and behind them."""
    q, k = (t[0] for t in local_attention(90, 1, 0))
    starts, lengths = torch.tensor([1, 40, 40]), torch.tensor([37, 0, 45])
    counts = count_dropped(q, k, (0.5,), BLOCK, starts, lengths)
    assert counts.sequence.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert counts.rows_behind.tolist()[:6] == [21, 5, 0, 29, 13, 0]
    assert counts.by_sequence()[0][:, 0].tolist() == [6, 0, 6]
    call = {"b_start_loc": starts, "b_seq_len": lengths}
    positions = torch.tensor([0, 1, 19, 38, 39, 40, 62, 84, 85])
    ((rows, its_k, arguments, sequence),) = single_rows(q, k, call, (positions + 0.5) / 90)
    assert its_k is k
    assert torch.equal(rows, q[positions])
    assert arguments["b_seq_len"].tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0]
    is_row = arguments["b_seq_len"] > 0
    assert sequence[is_row].tolist() == [0, 0, 2, 2, 2]
    assert arguments["b_seq_len_k"][is_row].tolist() == [1, 19, 1, 23, 45]
    alone = count_dropped(rows, k, (0.5,), BLOCK, **arguments)
    assert alone.by_sequence()[0][is_row, 0].tolist() == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("target", [0.05, 0.3, 0.6, 0.95])
def test_the_device_computes_the_same_threshold(curves, segmented, target):
    method = mtsa.sparsify(sharp_model(), config_of()).model.layers[0].self_attn.sparse_attention
    fits = [Calibrated.of(curve, target) for curve in (curves["prefill"], segmented)]
    for fit in (*fits, Calibrated(30.0, 2.0, target)):
        method.set_calibrated({"prefill": fit})
        keys = torch.tensor([1, 20, 64, 100, 300, 1000, 5000, 100_000])
        given = method.threshold(keys, False)
        assert given.shape == (8, 4)
        expected = [fit.threshold(n) for n in keys.tolist()]
        torch.testing.assert_close(given[:, 0], torch.tensor(expected), rtol=1e-4, atol=0)


def test_a_and_b_are_the_tangent(curves):
    """Other readers' λ is ours at the longest counted length, and near it at a target not far from ours."""
    own = Calibrated.of(curves["prefill"], 0.4)
    for target in (0.38, 0.4, 0.42):
        theirs = own.a * math.exp(own.b * target) / own.longest
        assert theirs == pytest.approx(own.with_target(target).threshold(own.longest), rel=0.02)


def test_one_length_alone_falls_as_its_inverse():
    curve = ShareCurve((0.1, 0.5), (100.0,), ((0.2, 0.6),), 100.0)
    own = Calibrated.of(curve, 0.4)
    assert own.threshold(100) == pytest.approx(math.sqrt(0.05))
    assert own.threshold(400) == pytest.approx(math.sqrt(0.05) / 4)
