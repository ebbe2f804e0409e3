"""The benchmark's own arithmetic, and a smoke run of it on a tiny case."""

import csv
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

CPU_IMPLS = ("fa_ops", "sdpa_sum", "sdpa_loop", "sdpa_padded")


def tiny_case(bench, is_causal=True, impls=CPU_IMPLS, lengths=(5, 33, 16), num_heads_kv=2):
    return bench.cases.Case("tiny", "float32", 4, num_heads_kv, 16, lengths, is_causal, impls)


def test_flops_match_a_count_by_hand(bench):
    case = tiny_case(bench, is_causal=False, lengths=(2, 3))
    forward = 2 * 2 * (2 * 2 + 3 * 3) * 16 * 4  # two products, a multiplication and an addition each
    assert case.flops("forward") == forward
    assert case.flops("backward") == 2.5 * forward
    assert case.flops("forward_backward") == 3.5 * forward
    assert tiny_case(bench, lengths=(2, 3)).flops("forward") == forward / 2


def test_cuda_cases_fill_the_card_and_their_twins_exist(bench):
    cases = [*bench.cases.goal_cases().values(), *bench.cases.more_cases()]
    names = [case.name for case in cases]
    for case in cases:
        assert case.impls[0] == "fa_ops"
        assert set(case.impls) <= set(bench.peers.PEERS)
        assert 16384 <= sum(case.lengths) <= 36864
        if case.twin is not None:
            twin = cases[names.index(case.twin)]
            assert twin.is_fixed_length
            assert twin.flops("forward") == pytest.approx(case.flops("forward"), rel=0.05)
    assert {case.head_dim for case in cases} == {64, 128, 256}
    cells = [tuple(bench.report.case_columns(case).values()) for case in cases]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_cpu_implementation_computes_the_same(bench, is_causal, direction):
    case = tiny_case(bench, is_causal)
    data = bench.peers.make_data(case, "cpu")
    prepared = {impl: bench.peers.PEERS[impl](case, data) for impl in CPU_IMPLS}
    findings = bench.comparing.compare(prepared, direction, 1e-5)
    assert findings.pop("fa_ops") == {}
    assert [set(finding) for finding in findings.values()] == [{"difference"}] * 3


def test_one_named_sdpa_backend_needs_equal_lengths(bench):
    case = tiny_case(bench, lengths=(8, 8), impls=("fa_ops", "sdpa_flash"))
    data = bench.peers.make_data(case, "cpu")
    prepared = {impl: bench.peers.PEERS[impl](case, data) for impl in case.impls}
    assert bench.comparing.compare(prepared, "backward", 1e-5)["sdpa_flash"]["difference"] <= 1e-5
    ragged = tiny_case(bench)
    with pytest.raises(ValueError, match=r"FLASH_ATTENTION needs sequences of equal length, got \(5, 33, 16\)"):
        bench.peers.PEERS["sdpa_flash"](ragged, bench.peers.make_data(ragged, "cpu"))


def test_a_peer_that_differs_and_one_that_raises_are_reported(bench):
    case = tiny_case(bench, impls=("fa_ops", "torch_varlen"))  # varlen_attn has no CPU kernel
    wrong = {"wrong": lambda case, data: bench.peers.packed_run(lambda q, k, v: 2 * q, data)}
    rows = bench.parts.bench_case(case, wrong, "cpu", bench.timing.CpuClock(), 1)
    by_impl = {row["impl"]: row for row in rows if row["direction"] == "forward"}
    assert "error" not in by_impl["fa_ops"]
    assert "median_ms" not in by_impl["torch_varlen"]
    assert by_impl["torch_varlen"]["error"]
    assert by_impl["wrong"]["error"].startswith("differs from fa_ops by ")
    assert by_impl["wrong"]["median_ms"] > 0


def test_interleave_takes_turns_and_drops_the_first_round(bench, counting_clock):
    turns = []
    run = {name: SimpleNamespace(forward=lambda name=name: turns.append(name)) for name in "abc"}
    samples = bench.timing.interleave(run, "forward", counting_clock, 4, seconds=60)
    assert samples == {name: [1.0] * 4 for name in "abc"}
    rounds = [turns[start : start + 3] for start in range(0, 15, 3)]
    assert [sorted(turn) for turn in rounds] == [["a", "b", "c"]] * 5


def test_ratio_is_our_speed_over_theirs(bench):
    key = dict.fromkeys(bench.report.KEY, "x")
    rows = [
        key | {"impl": "fa_ops", "median_ms": 2.0, "min_ms": 1.0},
        key | {"impl": "peer", "median_ms": 3.0, "min_ms": 0.5},
        key | {"impl": "broken", "error": "raised"},
    ]
    bench.report.add_ratios(rows, [])
    assert (rows[1]["ours_over_impl"], rows[1]["ours_over_impl_of_min"]) == (1.5, 0.5)
    assert "ours_over_impl" not in rows[2]


def test_a_missed_bar_is_printed_as_missed(bench):
    row = {"device": "cpu", "impl": "sdpa_loop", "tflops": 1.0}
    assert bench.report.bar_lines([row | {"ours_over_impl": 0.96}])[0].startswith("met")
    assert bench.report.bar_lines([row | {"ours_over_impl": ratio} for ratio in (0.96, 0.94)])[0].startswith("MISSED")


def test_memory_sees_a_known_allocation(bench):
    """Padded SDPA turns its mask of 4096 x 4096 booleans into floats: 64 MiB."""
    extra = bench.memory.measure_in_subprocess("sdpa_padded", "forward", 4096)
    assert 64 <= extra < 96


@pytest.fixture
def tiny_run(bench, tmp_path, monkeypatch):
    """run.main on one tiny case; its status and the rows of its CSV."""
    for module in (bench.parts, bench.goals):
        monkeypatch.setattr(module, "cpu_cases", lambda quick: [tiny_case(bench)])
    monkeypatch.setattr(bench.parts, "measure_in_subprocess", lambda impl, direction, length: 1.0)
    monkeypatch.setenv("FA_OPS_COMMIT", "abc123")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = bench.run.main(["--device", "cpu", "--rounds", "1", "--output", str(tmp_path), *arguments])
        with (tmp_path / "cpu.csv").open() as file:
            return status, list(csv.DictReader(file))

    return run


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_smoke(bench, tiny_run, tmp_path, monkeypatch, capsys, has_matplotlib):
    (tmp_path / "my_peer.py").write_text(
        "from fa_ops import varlen_attn\n"
        "def mine(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal):\n"
        "    window = (-1, 0 if causal else -1)\n"
        "    options = {'window_size': window, 'enable_gqa': True}\n"
        "    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **options)\n"
    )
    if has_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, rows = tiny_run("--peer", "my_peer:mine")
    assert status == 0
    timed = [row for row in rows if row["tflops"]]
    assert [row["impl"] for row in timed] == [*CPU_IMPLS, "my_peer:mine"] * 2
    assert {row["direction"] for row in timed} == {"forward", "forward_backward"}
    assert all(float(row["median_ms"]) > 0 and float(row["ours_over_impl"]) > 0 for row in timed)
    assert all(float(row["difference"]) < 1e-5 for row in timed if row["direction"] == "forward")
    assert {(row["commit"], row["torch"]) for row in rows} == {("abc123", torch.__version__)}
    assert sum(row["direction"] == "call_overhead" for row in rows) == 2
    output = capsys.readouterr()
    assert all(impl in output.out for impl in CPU_IMPLS)
    assert "CPU call overhead" in output.out
    assert (tmp_path / "cpu.png").exists() == has_matplotlib
    assert ("no plot" in output.err) != has_matplotlib

    table = (tmp_path / "goals-cpu.md").read_text()
    assert table in output.out
    lines = [line for line in table.splitlines() if line.startswith("| 14 |")]
    assert len(lines) == 2
    assert not any("not run" in line for line in lines)
    bench.goals.main(tmp_path / "cpu.csv")
    assert (tmp_path / "goals-cpu.md").read_text() == table


def test_a_time_limit_is_reported_in_every_row(tiny_run, tmp_path, capsys):
    status, rows = tiny_run("--time-limit", "-1")
    assert status == 0
    assert {row["skipped"] for row in rows} == {"not run: the time limit of -1 s had passed"}
    assert {row["direction"] for row in rows} == {"forward", "forward_backward", "call_overhead"}
    assert "no plot: nothing was timed" in capsys.readouterr().err
    assert "| not run: the time limit of -1 s had passed | – |" in (tmp_path / "goals-cpu.md").read_text()


def test_only_runs_what_it_names(bench, tiny_run, tmp_path, capsys):
    _, rows = tiny_run("--only", "overhead")
    assert {row["direction"] for row in rows} == {"call_overhead"}
    assert "| not run: left out by --only overhead | – |" in (tmp_path / "goals-cpu.md").read_text()
    capsys.readouterr()
    assert bench.run.main(["--device", "cuda", "--list", "--only", "^skip-softmax"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"skip-softmax {size}, causal" for size in ("1 x 32768", "4 x 8192", "1 x 131072")
    ]
    with pytest.raises(SystemExit, match="'no such' given, which is found in no part's name"):
        tiny_run("--only", "no such")


def test_a_part_that_fails_leaves_its_rows_and_the_others(bench, tiny_run, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(bench.parts, "make_data", fail)
    status, rows = tiny_run()
    assert status == 1
    errors = [row for row in rows if row["error"] == "OutOfMemoryError: too large"]
    assert len(errors) == 2 * len(CPU_IMPLS) + 2
    assert sum(row["peak_extra_mib"] == "1" for row in rows) == 4


def test_length_plot_has_a_panel_per_direction_and_head_dimension(bench, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [
        {"dtype": "bfloat16", "num_heads_q": 8, "num_heads_kv": 8, "head_dim": head_dim,
         "lengths": f"{16384 // length} x {length}", "is_causal": is_causal, "direction": direction,
         "impl": impl, "tflops": 100.0, "device": "cuda"}
        for head_dim in (64, 128) for length in (512, 1024) for is_causal in (True, False)
        for direction in ("forward", "backward") for impl in ("fa_ops", "sdpa_cudnn")
    ]  # fmt: skip
    figure = bench.plot.length_panels(rows, pyplot)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 8
    assert titles[0] == "forward, D 64, causal"
    pyplot.close(figure)
    bench.plot.write_plot(rows, tmp_path / "card.png", "a card")
    assert (tmp_path / "card.png").stat().st_size > 10_000


def test_tuning_puts_a_tile_in_the_table_and_takes_it_out_again(bench):
    configs = importlib.import_module("fa_ops.kernels.configs")
    tile, before = configs.Tile(32, 16, 2, 5), configs.select_tile("dq", "sm_90", 128, 128, False)
    with bench.tune_portable.table_row("dq", "sm_90", 128, tile):
        assert configs.select_tile("dq", "sm_90", 128, 128, False) == tile
        assert configs.select_tile("dq", "sm_90", 64, 64, False) != tile
    assert configs.select_tile("dq", "sm_90", 128, 128, False) == before


def test_tuning_times_the_named_kernel_alone(bench, monkeypatch):
    ops, launched = importlib.import_module("fa_ops.ops"), []

    class Kernel:
        def __init__(self, name):
            self.__name__ = name

    monkeypatch.setattr(ops, "launch_kernel", lambda kernel, *call: launched.append((kernel.__name__, *call)))
    with bench.tune_portable.timed_launches("wanted", bench.timing.CpuClock()) as marks:
        ops.launch_kernel(Kernel("wanted"), (2, 1), (5,), {"BLOCK_M": 16})
        ops.launch_kernel(Kernel("other"), (3,), (6,), {})
    assert launched == [("wanted", (2, 1), (5,), {"BLOCK_M": 16}), ("other", (3,), (6,), {})]
    assert len(marks) == 1


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_tuning_tries_fewer_tiles_where_heads_are_wider(bench, kernel):
    shared_memory = importlib.import_module("fa_ops.kernels.configs").SHARED_MEMORY["sm_90"]
    counts = [len(bench.tune_portable.candidates(kernel, head_dim, shared_memory)) for head_dim in (64, 128, 256)]
    assert counts[0] > counts[1] > counts[2] > 0


class TestSparsity:
    """examples/benchmarks/sparsity.py, on a tiny case."""

    BLOCK = (16, 16)

    @pytest.fixture
    def case(self, bench):
        return bench.cases.Case("tiny", "float32", 4, 2, 32, (200, 300), True, ("fa_ops", "sdpa_sum"))

    def test_structured_heads_drop_different_shares(self, bench, case):
        data = bench.structured.structured_data(case, "cpu")
        _, counts = bench.sparsity.skip_attention(
            case, data, self.BLOCK, torch.tensor(0.1), data.q, data.k, data.v, return_skip_counts=True
        )
        shares = counts[1].sum(0) / counts[0].sum(0)
        assert 0.05 < shares.min() < shares.max() - 0.05 < 0.9
        plain = bench.peers.make_data(case, "cpu")
        assert torch.equal(plain.v, data.v)
        assert bench.sparsity.dropped_share(case, plain, self.BLOCK, 0.1) < 0.01

    def test_structured_scores_favour_near_keys_and_sinks(self, bench):
        length = 2048
        case = bench.cases.Case("long", "float32", 4, 2, 32, (length,), True, ("fa_ops",))
        data = bench.structured.structured_data(case, "cpu")
        scores = torch.einsum("qhd,khd->qk", data.q, data.k.repeat_interleave(2, 1))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        sinks = bench.structured.NUM_SINKS
        far = scores[distance > length // 2][sinks:]
        assert scores[distance == 0][sinks:].mean() > far.mean() + 2 * far.std()
        assert scores[length // 2 :, :sinks].mean() > far.mean() + 2 * far.std()

    @pytest.mark.parametrize("wanted", [0.0, 0.3, 0.5])
    def test_a_threshold_is_found_for_a_share(self, bench, case, wanted):
        data = bench.structured.structured_data(case, "cpu")
        threshold, share = bench.sparsity.find_threshold(case, data, self.BLOCK, wanted)
        assert share == bench.sparsity.dropped_share(case, data, self.BLOCK, threshold)
        assert abs(share - wanted) < 0.01

    def test_break_even_is_interpolated(self, bench):
        assert bench.sparsity.break_even([(0.0, 0.9), (0.3, 1.1), (0.5, 1.2)]) == pytest.approx(0.15)
        assert bench.sparsity.break_even([(0.0, 1.0), (0.3, 1.1)]) == 0.0
        assert bench.sparsity.break_even([(0.0, 0.8), (0.3, 0.9)]) is None
        assert bench.sparsity.break_even([]) is None

    def run(self, bench, case, tmp_path, monkeypatch, *arguments, name="sparsity-cpu"):
        monkeypatch.setattr(bench.sparsity, "cases", lambda device: [case])
        monkeypatch.setenv("FA_OPS_COMMIT", "abc123")
        status = bench.sparsity.main(["--device", "cpu", "--block", "16", "16", "--output", str(tmp_path), *arguments])
        with (tmp_path / f"{name}.csv").open() as file:
            return status, list(csv.DictReader(file))

    def test_smoke(self, bench, case, tmp_path, monkeypatch, capsys):
        pytest.importorskip("matplotlib")
        status, rows = self.run(bench, case, tmp_path, monkeypatch)
        assert status == 0
        by_impl = {row["impl"]: row for row in rows}
        assert float(by_impl["fa_ops, 0% dropped"]["share"]) == 0.0
        assert float(by_impl["fa_ops, 0% dropped"]["difference"]) < 1e-5
        assert float(by_impl["fa_ops, 50% dropped"]["difference"]) > 1e-5
        for row in rows:
            assert (row["commit"], row["br"], row["bc"]) == ("abc123", "16", "16")
            assert row["skipped"] or float(row["speed_over_dense"]) > 0
            if row["wanted"] and not row["skipped"]:
                assert abs(float(row["share"]) - float(row["wanted"])) < 0.02
        assert "when nothing is dropped" in capsys.readouterr().out
        assert (tmp_path / "sparsity-cpu.png").stat().st_size > 10_000

    def test_portable_kernels_have_files_of_their_own(self, bench, case, tmp_path, monkeypatch):
        monkeypatch.setattr(bench.sparsity.tier, "TIER", "portable")
        monkeypatch.setattr(bench.sparsity, "SHARES", ())
        _, rows = self.run(bench, case, tmp_path, monkeypatch, name="sparsity-cpu-portable")
        assert {row["tier"] for row in rows} == {"portable"}
        assert not (tmp_path / "sparsity-cpu.csv").exists()

    def test_a_threshold_that_should_drop_nothing_but_does_fails(self, bench, case, tmp_path, monkeypatch):
        monkeypatch.setattr(bench.sparsity, "NOTHING", 0.3)
        monkeypatch.setattr(bench.sparsity, "SHARES", ())
        status, rows = self.run(bench, case, tmp_path, monkeypatch)
        assert status == 1
        assert any(row["error"].startswith("λ 0.3 dropped a share of ") for row in rows)

    def test_the_time_limit_is_reported(self, bench, case, tmp_path, monkeypatch, capsys):
        status, rows = self.run(bench, case, tmp_path, monkeypatch, "--time-limit", "-1")
        assert (status, len(rows)) == (0, 1)
        assert rows[0]["skipped"] == "not run: the time limit of -1 s had passed"
        assert "no plot" in capsys.readouterr().err


class TestModels:
    """examples/benchmarks/models.py, on its tiny model."""

    @pytest.fixture
    def models(self, bench, monkeypatch):
        pytest.importorskip("transformers")
        module = importlib.import_module("models")
        monkeypatch.setattr(module, "IMPLS", ("modelopt_triton", "sdpa", "eager"))
        monkeypatch.setattr(module, "cells", lambda quick, cells=module.cells: cells(quick)[:3])
        monkeypatch.setattr(module, "MAX_ROUNDS", 3)
        monkeypatch.setenv("FA_OPS_COMMIT", "abc123")
        yield module
        del sys.modules["models"]

    @staticmethod
    def rows(models, tmp_path, *arguments):
        status = models.main(["--device", "cpu", "--quick", "--output", str(tmp_path), *arguments])
        with (tmp_path / "models-quick-cpu.csv").open() as file:
            return status, list(csv.DictReader(file))

    def test_smoke(self, models, tmp_path, capsys):
        status, rows = self.rows(models, tmp_path)
        assert status == 0
        assert [row["impl"] for row in rows] == [*models.IMPLS] * 3
        assert [(row["task"], row["layout"]) for row in rows[::3]] == [
            ("prefill", "padded"),
            ("prefill", "packed"),
            ("decode", "padded"),
        ]
        for row in rows:
            assert float(row["median_ms"]) > 0
            assert float(row["difference"]) < 0.05
            assert (row["commit"], row["torch"]) == ("abc123", torch.__version__)
            assert not row["error"]
        assert all(row["ours_over_impl"] for row in rows)
        table = (tmp_path / "models-quick-cpu.md").read_text()
        assert table in capsys.readouterr().out
        assert sum(line.startswith(("| prefill", "| decode")) for line in table.splitlines()) == 3

    def test_a_cell_that_raises_is_reported(self, models, tmp_path, monkeypatch):
        def out_of_memory(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        implementations = importlib.import_module("transformers").AttentionInterface._global_mapping
        monkeypatch.setitem(implementations, "sdpa", out_of_memory)
        status, rows = self.rows(models, tmp_path)
        assert status == 0, "what has nothing to be compared with does not differ"
        by_impl = {row["impl"]: row for row in rows[:3]}
        assert by_impl["modelopt_triton"]["unchecked"] == "sdpa: out of memory"
        assert by_impl["modelopt_triton"]["median_ms"]
        assert by_impl["sdpa"]["error"] == "out of memory"
        assert not by_impl["sdpa"]["median_ms"]
        assert "[1] out of memory" in (tmp_path / "models-quick-cpu.md").read_text()

    def test_a_cell_that_differs_is_reported(self, models, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "fa_ops.integrations.huggingface.attention", lambda q, k, v, *args, **kwargs: torch.zeros_like(q)
        )
        status, rows = self.rows(models, tmp_path)
        assert status == 1
        assert all(row["error"].startswith("differs from sdpa by ") for row in rows[::3])
        assert not any(row["error"] for row in rows if row["impl"] != "modelopt_triton")

    def test_resumes_where_the_time_limit_ended_it(self, models, tmp_path, monkeypatch):
        _, rows = self.rows(models, tmp_path, "--time-limit", "-1")
        assert all(row["skipped"] == "not run: the time limit of -1 s had passed" for row in rows)
        assert len(rows) == 9
        _, first = self.rows(models, tmp_path, "--resume")
        _, second = self.rows(models, tmp_path, "--resume", "--time-limit", "-1")
        for row, again in zip(first, second, strict=True):
            assert {**row, "ours_over_impl": ""} == {**again, "ours_over_impl": ""}
        monkeypatch.setenv("FA_OPS_COMMIT", "another")
        _, rows = self.rows(models, tmp_path, "--resume", "--time-limit", "-1")
        assert all(row["skipped"] for row in rows)

    def test_cells(self, models):
        sizes = importlib.reload(models).cells(quick=False)
        assert len(sizes) == len(set(sizes)) == 9 + 6 + 6
        assert {workload.length for _, workload in sizes} == {2048, 8192, 32768}
        for mode in models.MODES:
            assert any(cell_mode == mode for cell_mode, _ in sizes)
        for _, workload in sizes:
            lengths = workload.lengths
            assert lengths[0] == workload.length
            assert len(set(lengths)) == workload.batch
            assert min(lengths) >= workload.length // 2
