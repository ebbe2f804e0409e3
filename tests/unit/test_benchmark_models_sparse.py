"""examples/benchmarks/models_sparse.py and what it is made of, on its tiny model."""

import csv
import importlib
import sys
from functools import partial

import pytest
import torch

import fa_ops.sparsity as mtsa

MODULES = ("attention_time", "structured_model", "model_rows", "models", "models_sparse")


@pytest.fixture(scope="module")
def loaded(bench):
    pytest.importorskip("transformers")
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def script(loaded, monkeypatch):
    module = loaded["models_sparse"]
    monkeypatch.setattr(module, "MODE", "eager")
    monkeypatch.setattr(module, "IMPLS", ("modelopt_triton", "sdpa"))
    monkeypatch.setattr(loaded["models"], "MAX_ROUNDS", 3)
    monkeypatch.setattr(module, "ATTENTION_CALLS", 2)
    monkeypatch.setenv("FA_OPS_COMMIT", "abc123")
    return module


@pytest.fixture
def models(script):
    return script.make_models(script.TINY, "cpu", (16, 16))


def rows_of(script, tmp_path, *arguments):
    status = script.main(["--device", "cpu", "--quick", "--output", str(tmp_path), *arguments])
    with (tmp_path / "models-sparse-quick-cpu.csv").open() as file:
        return status, list(csv.DictReader(file))


def test_smoke_and_resumption(script, tmp_path, capsys):
    status, rows = rows_of(script, tmp_path)
    assert status == 0
    assert [row["impl"] for row in rows[:4]] == [
        "modelopt_triton",
        "sdpa",
        "modelopt_triton, 50% dropped",
        "modelopt_triton, 70% dropped",
    ]
    assert [(row["task"], row["cache"]) for row in rows[::4]] == [("prefill", "none"), ("decode", "static")]
    for row in rows:
        assert not row["error"] + row["skipped"]
        assert 0 < float(row["attention_min_ms"]) <= float(row["attention_ms"])
        assert float(row["difference"]) < 0.05
        tokens = {"prefill": 512, "decode": 4}[row["task"]]
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * tokens / float(row["median_ms"]), rel=1e-3)
        assert float(row["speed_over_sdpa"]) > 0 < float(row["attention_over_modelopt_triton"])
        if row["wanted"]:
            assert abs(float(row["share"]) - float(row["wanted"])) < 0.02
            assert float(row["difference_from_dense"]) > 2 * float(row["difference"]), "dropping makes a difference"
    table = (tmp_path / "models-sparse-quick-cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| modelopt_triton, 50% dropped |") == 2

    status, again = rows_of(script, tmp_path, "--resume", "--time-limit", "-1")
    assert (status, len(again)) == (0, 8)
    for row, kept in zip(rows, again, strict=True):
        assert {name: x for name, x in row.items() if "_over_" not in name} == {
            name: x for name, x in kept.items() if "_over_" not in name
        }
    _, rows = rows_of(script, tmp_path, "--time-limit", "-1")
    assert all(row["skipped"] == "not run: the time limit of -1 s had passed" for row in rows)


def test_a_compiled_model_that_runs_dense_fails(script, models, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "make_models", lambda *_: models)
    monkeypatch.setattr(script, "workloads", lambda quick, of=script.workloads: of(quick)[:1])
    monkeypatch.setattr(script, "SHARES", (0.7,))
    monkeypatch.setattr(script, "compiled", lambda model, mode: models["modelopt_triton"])
    status, rows = rows_of(script, tmp_path)
    assert status == 1
    assert [row["error"].startswith("differs from the same in eager mode by ") for row in rows] == [False, False, True]


def test_a_share_that_no_threshold_drops_is_skipped(script, models, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "make_models", lambda *_: models)
    monkeypatch.setattr(script, "workloads", lambda quick, of=script.workloads: of(quick)[:1])
    monkeypatch.setattr(script, "SHARES", (0.99,))
    status, rows = rows_of(script, tmp_path)
    assert status == 0
    assert rows[-1]["skipped"].startswith("no λ was found that drops more than 0.")
    assert not rows[-1]["median_ms"]


@torch.no_grad()
def test_the_structure_decides_what_is_dropped(script, models, loaded):
    """Of the heads and layers of the structured model a λ drops different shares; of the same text through weights that
    are merely random less of each."""
    workload = script.TextWorkload("prefill", "equal", 512, 4)
    ids = torch.stack(workload.documents(models["sdpa"]))
    random = loaded["models"].make_model(script.TINY, "cpu", initializer_range=script.TINY["hidden_size"] ** -0.5)
    mtsa.sparsify(random, {"sparse_cfg": {"*": {"backend": "triton", "br": 16, "bc": 16}}})
    shares = []
    for model in (models[script.SPARSE], random):
        mtsa.set_thresholds(model, {"prefill": [0.1]})
        with mtsa.collect_stats(model):
            model(ids)
        visited, dropped = torch.stack(list(mtsa.block_counts(model).values()))[:, 0].unbind(1)
        shares.append(dropped / visited)
    structured, plain = shares
    assert structured.max() - structured.min() > 0.1
    assert 0.2 < structured.mean() < 0.8
    assert plain.max() < structured.min()


@torch.no_grad()
def test_all_implementations_of_the_tiny_model_agree(models):
    ids = torch.arange(40)[None] % 64
    logits = [models[impl](ids).logits for impl in ("modelopt_triton", "sdpa")]
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_decoding_starts_again(script, models):
    (_, workload) = script.workloads(quick=True)
    cache, ids = script.text_cache(models["sdpa"], workload)
    run = script.TextDecoding(models["sdpa"], models["sdpa"], cache, ids, workload.length)
    logits = [run().clone() for _ in range(2 * script.STEPS)]
    for first, second in zip(logits[: script.STEPS], logits[script.STEPS :], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(logits[0], logits[1])
    document = workload.documents(models["sdpa"])[0]
    assert ids[0] == document[-script.STEPS]
    whole = models["sdpa"](document[None, : 1 - script.STEPS], logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits[0][:1], whole, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_attention_is_timed_inside_one_graph(script, loaded, counting_clock):
    attention_time, made = loaded["attention_time"], loaded["models"]
    model = made.with_attention(made.make_model({**script.TINY, "num_hidden_layers": 1}, "cpu"), "modelopt_triton")
    ids = torch.arange(40)[None]
    expected = model(ids).logits
    with attention_time.marked_attention("modelopt_triton"):
        call = partial(torch.compile(model, backend="aot_eager", fullgraph=True), ids)
        times = attention_time.attention_milliseconds(call, counting_clock, 3)
        assert torch.equal(call().logits, expected)
    assert times == [1] * 3, "milliseconds between two readings of the clock"
    assert attention_time.attention_milliseconds(partial(model, ids), counting_clock, 1) == [0], "given back"
