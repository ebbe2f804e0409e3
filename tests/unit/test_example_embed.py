"""`examples/embed_texts.py`: what it compares, and that it would see a difference."""

import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TEXTS = ["a", "a text of some words", "two words", "the longest text of all of them, which needs no padding"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import embed_texts

    embed_texts.fa_ops.register_triton_attention()
    monkeypatch.setattr(embed_texts, "SIZES", {"cpu": (32, 2, 2), "cuda": (32, 2, 2)})
    return embed_texts


@pytest.fixture
def saved_encoder(tmp_path):
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *"abcdefg"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path / "encoder"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.model_max_length = 6
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_embeddings_depend_neither_on_padding_nor_on_the_attention(example):
    tokenize, model = example.load_tokenizer(None, 64), example.load_model(None, 64, CPU)
    batch = tokenize(TEXTS)
    together = example.embed(model, [batch])
    alone = example.embed(model, [tokenize([text]) for text in TEXTS])
    assert example.largest_difference(together, alone) < example.LARGEST_DIFFERENCE
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(TEXTS)))
    model.set_attn_implementation("eager")
    assert example.largest_difference(together, example.embed(model, [batch])) < example.LARGEST_DIFFERENCE

    class Unpadded(type(model)):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask=None)

    model.__class__ = Unpadded
    assert example.largest_difference(together, example.embed(model, [batch])) > 100 * example.LARGEST_DIFFERENCE


def test_model_that_does_not_call_the_op_is_refused(example):
    model = example.load_model(None, 64, CPU)
    batch = example.load_tokenizer(None, 64)(TEXTS)
    example.check_attention(model, batch)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="--model: BertModel does not call modelopt_triton"):
        example.check_attention(model, batch)


@pytest.mark.parametrize(
    ("error", "eager_error", "status"),
    [(1e-7, 0.0, 0), (1e-4, 0.0, 1), (math.nan, 0.0, 1), (1e-3, 6e-4, 0), (1e-3, 4e-4, 1)],
)
def test_difference_counts_against_float32_and_against_eagers_own(example, capsys, error, eager_error, status):
    expected = torch.eye(3)
    results = {"modelopt_triton": example.Result(expected + error, 1.0), "sdpa": example.Result(expected, 1.5)}
    results["eager"] = example.Result(expected + eager_error, 2.0)
    assert example.report(results, expected) == status
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == bool(status)
    assert re.search(r"^eager +1\.5 +2\.00x", printed, re.MULTILINE)


def test_texts_are_lines_of_a_file_or_docstrings(example, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one  line\n\n   \nanother\nthird\n")
    assert example.load_texts(path, 2) == ["one line", "another"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="has only empty lines"):
        example.load_texts(path, 2)
    docstrings = example.load_texts(None, 30)
    assert len(docstrings) == 30
    assert all(text and "\n" not in text for text in docstrings)
    assert docstrings == example.load_texts(None, 30)


def test_saved_encoder_embeds_the_lines_of_a_file(example, saved_encoder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g a b c\na\nb b other\n")
    arguments = Namespace(model=saved_encoder, text=text, count=9, batch_size=3, max_length=64, bf16=False)
    assert example.run(arguments) == 0
    assert "3 texts of 1 to 6 tokens in batches of 3, 44% padding; BertModel" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [None, pytest.param("--bf16", marks=pytest.mark.slow)])
def test_example_runs_as_it_stands(flag):
    arguments = ["--count", "12", "--batch_size", "4", "--max_length", "64", *([flag] if flag else [])]
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "embed_texts.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines() if re.search(r"\d\.\d\dx ", line)}
    assert list(rows) == ["modelopt_triton", "sdpa", "eager"]
    difference, cosine = map(float, rows["modelopt_triton"][3:])
    bound = torch.finfo(torch.bfloat16).eps if flag else 64 * torch.finfo(torch.float32).eps
    assert difference < bound
    assert cosine > 1 - bound
    assert run.stdout.rstrip().endswith("ok")
