"""`examples/train_small_lm.py` and the text that it learns from."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_small_lm

    train_small_lm.fa_ops.register_triton_attention()
    return train_small_lm


@pytest.fixture
def textdata(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import textdata

    return textdata


@pytest.fixture
def tiny(example):
    return example.Preset(32, 64, 2, 2, 1, context=64, batch_size=2, learning_rate=1e-3)


def test_pieces_end_at_line_ends_and_lose_nothing(textdata):
    text = b"".join(b"line %d\n" % i for i in range(50)) + b"x" * 100 + b"\nend"
    pieces = textdata.cut(text, 30)
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= 30
    assert all(piece.endswith(b"\n") for piece in pieces[: text.index(b"x") // 30])


def test_padding_is_masked_and_without_label(textdata):
    batch = textdata.pad([b"abc", b"", b"\xff"])
    boundary = textdata.BOUNDARY
    assert batch["input_ids"].tolist() == [
        [boundary, 97, 98, 99],
        [boundary, boundary, boundary, boundary],
        [boundary, 255, boundary, boundary],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"][:, 1:].tolist() == [[97, 98, 99], [-100, -100, -100], [255, -100, -100]]


def test_batches_hold_every_piece_once_a_round_and_little_padding(textdata):
    pieces = [bytes([i % 250]) * (1 + i * 37 % 200) for i in range(1000)]
    batches = list(itertools.islice(textdata.training_batches(pieces, 4, seed=0), 250))
    assert sorted(itertools.chain(*batches)) == sorted(pieces)
    assert batches == list(itertools.islice(textdata.training_batches(pieces, 4, seed=0), 250))
    padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
    assert padded < 1.05 * sum(map(len, pieces))


def test_held_out_split_follows_names_alone(textdata):
    documents = [(f"module_{i}.py", b"text") for i in range(500)]
    training, held_out = textdata.split_held_out(documents)
    assert sorted(training + held_out) == sorted(documents)
    assert 5 <= len(held_out) <= 40
    again = textdata.split_held_out([(name, text * 2) for name, text in reversed(documents)])[1]
    assert [name for name, _ in again] == [name for name, _ in held_out]


def test_text_comes_from_a_file_or_a_folder_without_binary_and_hidden_files(textdata, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"a\n" * 20000)
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    (tmp_path / ".hidden").write_bytes(b"text")
    assert textdata.text_documents(tmp_path) == [("sub/a.txt", b"a\n" * 20000)]
    parts = textdata.text_documents(tmp_path / "sub" / "a.txt")
    assert len(parts) == 3
    assert b"".join(text for _, text in parts) == b"a\n" * 20000
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        textdata.text_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match="1 non-empty documents"):
        textdata.split_held_out(textdata.text_documents(tmp_path))


def test_standard_library_is_found_without_its_tests(textdata):
    names = {name for name, _ in textdata.stdlib_documents()}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)


def test_learning_rate_warms_up_and_ends_at_zero(example):
    rates = [example.learning_rate(1.0, step, 0.0) for step in range(example.WARM_UP_STEPS)]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert example.learning_rate(1.0, 1000, 0.5) == pytest.approx(0.5)
    assert example.learning_rate(1.0, 1000, 1.0) == pytest.approx(0.0)
    assert example.CURVE_STEPS <= example.WARM_UP_STEPS


def test_a_missed_bar_fails_and_is_named(example, capsys):
    rows = [example.at_most("loss", 2.4, 2.5, ".2f"), example.exactly("graph breaks", 0, 0)]
    assert example.report(rows) == 0
    rows += [example.at_most("curve", 0.1, 1e-3, ".1e"), example.at_most("logits", math.nan, 1e-3, ".1e")]
    assert example.report(rows) == 1
    assert "missed: curve, logits" in capsys.readouterr().out


def test_loss_difference_covers_eagers_steps_and_keeps_nan(example):
    assert example.largest_loss_difference([1.0, 2.0, 9.0], [1.0, 2.5]) == 0.5
    assert math.isnan(example.largest_loss_difference([1.0, math.nan, 9.0], [1.5, 2.5]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("attention", "ops"), [("modelopt_triton", 2), ("sdpa", 0)])
def test_attention_ops_are_counted_in_the_graph(example, tiny, attention, ops):
    device = torch.device("cpu")
    model = example.build_model(tiny, tiny.context, attention, device)
    assert example.explain(model, example.to_device([b"some text", b"text"], device)) == (0, ops)


def test_logit_difference_sees_other_attention_but_no_padding(example, tiny):
    device = torch.device("cpu")
    model, eager = (example.build_model(tiny, tiny.context, name, device) for name in ("modelopt_triton", "eager"))
    batch = example.to_device([b"some longer text", b"text"], device)
    assert example.largest_logit_difference(model, eager, batch) < example.LARGEST_LOGIT_DIFFERENCE
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
        layer.self_attn.q_proj.weight.data.mul_(30)
        eager.model.layers[layer.self_attn.layer_idx].self_attn.q_proj.weight.data.mul_(30)
    assert example.largest_logit_difference(model, eager, batch) > example.LARGEST_LOGIT_DIFFERENCE


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_example_trains_generates_and_saves(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n\n\n" for i in range(2000)))
    arguments = ["--text", text, "--steps", "60", "--context", "64", "--output", tmp_path / "output"]
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_small_lm.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = dict(line.rsplit("  ", 1)[0].split("  ", 1) for line in run.stdout.splitlines() if line.endswith(" ok"))
    assert {"graph breaks", "compiled frames, decoding", "largest loss difference, 20 steps"} <= rows.keys()
    held_out = next(line for line in run.stdout.splitlines() if line.startswith("held-out loss"))
    assert float(held_out.split()[-1]) < 4.0, "an untrained model has 8 bits per byte"
    assert (tmp_path / "output" / "loss.png").stat().st_size > 10_000

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "model")
    assert model.config.byte_level is True
    assert model.config.vocab_size == 264
