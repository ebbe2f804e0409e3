"""What the benchmark measures for the goals, on tiny shapes, and the table that it makes of its rows."""

import importlib
import sys

import pytest
import torch

import fa_ops
from fa_ops.kernels import tier


def decode_case(bench, page_size=None):
    return bench.decode.DecodeCase(3, 4, 2, 16, 64, page_size, "float32")


class TestDecode:
    @pytest.mark.parametrize("page_size", [None, 16])
    def test_rows(self, bench, counting_clock, page_size):
        case = decode_case(bench, page_size)
        rows = {row["impl"]: row for row in bench.decode.bench_decode(case, "cpu", counting_clock, 3)}
        assert tuple(rows) == case.impls
        assert case.cache_bytes == 2 * 3 * 64 * 2 * 16 * 4
        ours = rows["fa_ops"]
        assert ours["difference"] < 1e-6
        assert ours["gb_per_s"] == pytest.approx(case.cache_bytes / 1e-3 / 1e9)
        assert "error" not in ours
        if page_size is None:
            assert rows["sdpa_flash"]["difference"] < 1e-6
            assert rows["sdpa_flash"]["gb_per_s"] == ours["gb_per_s"]
        absent = rows["torch_varlen" if page_size else "sdpa_cudnn"]  # no CPU kernel
        assert absent["error"]
        assert "median_ms" not in absent

    def test_a_wrong_result_is_an_error(self, bench, counting_clock, monkeypatch):
        """Of ours against float64, though the peers then differ from it as well."""
        attention = fa_ops.attention
        monkeypatch.setattr(
            fa_ops, "attention", lambda q, k, v, *rest, **options: attention(q, k, -v, *rest, **options)
        )
        rows = {row["impl"]: row for row in bench.decode.bench_decode(decode_case(bench), "cpu", counting_clock, 3)}
        assert rows["fa_ops"]["error"].startswith("differs from attention in float64 by 2.0e+00")
        assert rows["sdpa_flash"]["error"].startswith("differs from fa_ops by 2.0e+00")

    def test_pages_belong_to_the_sequences_in_another_order(self, bench):
        cache = bench.decode.make_cache(decode_case(bench, 16), "cpu")
        assert sorted(cache.table.flatten().tolist()) == list(range(12))
        assert cache.table.flatten().tolist() != list(range(12))
        with pytest.raises(ValueError, match="page_size: 24 given for 64 keys"):
            bench.decode.make_cache(decode_case(bench, 24), "cpu")

    def test_the_goals_workload(self, bench):
        largest = max(bench.decode.decode_cases(), key=lambda case: case.cache_bytes)
        assert largest.cache_bytes == 17_179_869_184
        assert all(case.batch == 64 and case.head_dim == 128 for case in bench.decode.decode_cases())

    def test_shares_are_of_the_copy_in_the_same_run(self, bench, counting_clock):
        rows = bench.decode.bench_copy("cpu", counting_clock, 3, 5_000_000)
        assert rows[0]["gb_per_s"] == pytest.approx(10.0)
        rows += bench.decode.bench_decode(decode_case(bench), "cpu", counting_clock, 3)
        bench.report.add_ratios(rows, [])
        assert rows[1]["share_of_copy"] == pytest.approx(rows[1]["gb_per_s"] / 10)
        assert rows[1]["share_of_h200"] == pytest.approx(rows[1]["gb_per_s"] / 4300)
        assert "GB/s" in bench.report.table(rows)


class TestPrefill:
    @pytest.fixture
    def models(self, bench):
        pytest.importorskip("transformers")
        models = importlib.import_module("models")
        yield bench.prefill.make_models("cpu", models.TINY)
        del sys.modules["models"]

    @pytest.mark.parametrize("layout", ["equal", "padded", "packed"])
    def test_attention_is_a_part_of_the_whole(self, bench, models, counting_clock, layout):
        from transformers import AttentionInterface

        before = AttentionInterface()["modelopt_triton"]
        rows = bench.prefill.bench_prefill(models, layout, counting_clock, 2, 48)
        assert AttentionInterface()["modelopt_triton"] is before
        assert [row["impl"] for row in rows] == ["fa_ops", "sdpa"] * 2
        assert not any("error" in row for row in rows)
        assert rows[0]["difference"] < 0.05
        # clocks read around the whole and around each of two layers' attention, one millisecond apart
        assert [row["median_ms"] for row in rows] == [5.0, 5.0, 2.0, 2.0]
        assert {row["samples"] for row in rows} == {bench.prefill.ROUNDS}

    def test_a_wrong_result_is_an_error(self, bench, models, counting_clock, monkeypatch):
        attention = "fa_ops.integrations.huggingface.attention"
        monkeypatch.setattr(attention, lambda q, k, v, *args, **kwargs: torch.zeros_like(q))
        rows = bench.prefill.bench_prefill(models, "equal", counting_clock, 2, 48)
        assert [row.get("error", "")[:12] for row in rows] == ["differs from", ""] * 2

    def test_what_raises_is_a_row(self, bench, models, counting_clock, monkeypatch):
        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("too large")

        monkeypatch.setattr("fa_ops.integrations.huggingface.attention", fail)
        rows = bench.prefill.bench_prefill(models, "padded", counting_clock, 2, 48)
        assert [row.get("error") for row in rows] == ["OutOfMemoryError: too large", None] * 2
        assert ["median_ms" in row for row in rows] == [False, True] * 2


def test_without_transformers_prefill_is_left_out(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    rows = [row for part in bench.parts.prefill_parts("cpu", bench.timing.CpuClock()) for row in part.measure()]
    assert len(rows) == 12
    assert all(row["skipped"].startswith("not run: ModuleNotFoundError: import of transformers") for row in rows)


def test_the_portable_tier_holds_forward_and_backward_and_ends(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(tier, "TIER", "another")
    attention = fa_ops.attention

    class Seeing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(tier.TIER)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(tier.TIER)
            return grad

    monkeypatch.setattr(fa_ops, "attention", lambda q, *rest, **options: attention(Seeing.apply(q), *rest, **options))
    case = bench.cases.Case("tiny", "float32", 4, 2, 16, (5, 33), True, ("fa_ops", "fa_ops_portable"))
    data = bench.peers.make_data(case, "cpu")
    for impl in case.impls:
        run = bench.peers.PEERS[impl](case, data)
        run.backward(run.forward())
        assert tier.TIER == "another"
    assert seen == ["another"] * 2 + ["portable"] * 2
    with pytest.raises(RuntimeError), bench.peers.portable_tier():
        raise RuntimeError
    assert tier.TIER == "another"


def test_skip_softmax_rows_and_both_pictures(bench, tmp_path):
    pytest.importorskip("matplotlib")
    case = bench.cases.Case("tiny", "float32", 4, 2, 32, (300,), True, ("fa_ops", "sdpa_flash"))
    part = bench.parts.skip_part(case, "cpu", bench.timing.CpuClock())
    rows = [row | {"device": "cpu", "card": "a card", "torch": "", "date": ""} for row in part.measure()]
    assert [row["impl"] for row in rows] == [row["impl"] for row in part.planned]
    assert {row["direction"] for row in rows} == {"skip_softmax"}
    bench.run.plot(rows, tmp_path / "card", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["sparsity-card.png"]  # there is no other speed to draw
    rows.append(rows[0] | {"direction": "forward"})
    bench.run.plot(rows, tmp_path / "card", "title")
    assert (tmp_path / "card.png").exists()


class TestGoals:
    @pytest.fixture
    def planned(self, bench):
        clock = bench.timing.CpuClock()
        return [row for part in bench.parts.cuda_parts(False, {}, clock, 1) for row in part.planned]

    def test_quick_leaves_out_pages_and_the_longest_text_alone(self, bench):
        parts = bench.parts.cuda_parts(True, {}, bench.timing.CpuClock(), 1)
        cells = {bench.goals.row_key(row, row["impl"]) for part in parts for row in part.planned}
        absent = [
            goal.workload for goal in bench.goals.goals("")
            if goal.device == "cuda" and bench.goals.row_key(goal.columns, goal.figures[0].impl) not in cells
        ]  # fmt: skip
        assert absent
        assert all("pages" in workload or "131072" in workload for workload in absent)

    def test_every_goal_is_measured_by_a_part(self, bench, planned):
        clock = bench.timing.CpuClock()
        parts = bench.parts.cuda_parts(False, {}, clock, 1) + bench.parts.cpu_parts(False, {}, clock, 1)
        cells = {bench.goals.row_key(row, row["impl"]) for part in parts for row in part.planned}
        goals = bench.goals.goals("NVIDIA H200")
        assert {goal.number for goal in goals} == set(range(1, 16))
        for goal in goals:
            assert all(bench.goals.row_key(goal.columns, figure.impl) in cells for figure in goal.figures)
            assert any(figure.first is not None for figure in goal.figures)

    def table(self, bench, rows, device="cuda", **changes):
        """Lines of the table, by number, of rows that all have `card`."""
        card = changes.pop("card", "NVIDIA H200")
        text = bench.goals.markdown([{"card": card, **row, **changes} for row in rows], device)
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:3] in ("| 1", "| 8", "| 9")]
        return {int(cells[0]): cells for cells in reversed(lines)}

    def test_what_has_not_run_says_why(self, bench, planned):
        found = self.table(bench, [row | {"skipped": "not run: the time limit"} for row in planned])
        assert found[1][4:] == ["not run: the time limit", "–"]
        assert found[14][4:] == ["not run: --device cpu measures it, for goals-cpu.md", "–"]
        assert self.table(bench, planned, error="Boom: a | b")[8][4:] == ["not run: Boom: a / b", "–"]
        assert self.table(bench, [])[15][4:] == ["not run: no part of this run measures it", "–"]
        assert self.table(bench, [], device="cpu")[15][4:] == ["not run: it needs a CUDA device", "–"]

    @pytest.mark.parametrize(
        ("ratio", "tflops", "met"), [(0.91, 700, "no"), (0.93, 700, "first"), (1.01, 679, "first"), (1.01, 680, "both")]
    )
    def test_both_bars_are_judged(self, bench, planned, ratio, tflops, met):
        cells = self.table(bench, planned, ours_over_impl=ratio, tflops=tflops)[1]
        assert cells[2:] == ["0.92", "1, 680 TFLOP/s", f"{ratio:.3g}, {tflops} TFLOP/s", met]

    @pytest.mark.parametrize(("microseconds", "met"), [(61, "no"), (60, "first"), (30, "both")])
    def test_a_ceiling(self, bench, planned, microseconds, met):
        cells = self.table(bench, planned, median_ms=microseconds / 1000)[15]
        assert cells[2:] == ["≤ 60 µs", "≤ 30 µs", f"{microseconds} µs", met]

    @pytest.mark.parametrize(("speed", "added", "met"), [(0.94, "+6.38 %", "no"), (1 / 1.019, "+1.9 %", "both")])
    def test_time_that_looking_adds(self, bench, planned, speed, added, met):
        assert self.table(bench, planned, speed_over_dense=speed)[9][4:] == [added, met]

    def test_decoding_is_held_to_the_cards_own_copy_unless_it_is_an_h200(self, bench, planned):
        figures = {"share_of_h200": 0.5, "share_of_copy": 0.9, "gb_per_s": 2150.0}
        on_h200 = self.table(bench, planned, **figures)[8]
        assert on_h200[2] == "0.85 of 4.3 TB/s"
        assert on_h200[4:] == ["0.5 of 4.3 TB/s, 0.9 of this card's copy, 2150 GB/s", "no"]
        elsewhere = self.table(bench, planned, card="NVIDIA H100", **figures)[8]
        assert elsewhere[2] == "0.85 of this card's copy"
        assert elsewhere[4:] == [on_h200[4], "first"]

    def test_a_figure_of_a_wrong_result_meets_nothing(self, bench, planned):
        rows = [row | ({"error": "differs"} if row["impl"] == "fa_ops" else {}) for row in planned]
        assert self.table(bench, rows, ours_over_impl=2.0, tflops=900)[1][4:] == ["2, differs, 900 TFLOP/s", "no"]

    def test_twins_are_compared_in_speed(self, bench):
        case, twin = bench.cases.varlen_cases(4, 16, 128, 256, with_flex=False)
        rows = [
            bench.report.case_columns(c) | {"direction": "backward", "impl": impl, "tflops": tflops}
            for c, impl, tflops in ((case, "fa_ops", 90.0), (twin, "fa_ops", 100.0), (twin, "sdpa_cudnn", 120.0))
        ]
        bench.report.add_ratios(rows, [case, twin])
        assert (rows[0]["over_twin"], rows[0]["over_twin_cudnn"]) == (0.9, 0.75)
        assert "over_twin" not in rows[1]
        assert bench.report.twin_lines(rows)[0].endswith("backward: 0.900")
