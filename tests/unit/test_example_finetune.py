"""`examples/finetune_packed.py`: what it learns from, and that its comparison would see documents that mix."""

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
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import finetune_packed

    finetune_packed.fa_ops.register_triton_attention()
    monkeypatch.setattr(finetune_packed, "SIZES", {"cpu": (32, 2, 2), "cuda": (32, 2, 2)})
    return finetune_packed


@pytest.fixture
def arguments(tmp_path):
    return Namespace(
        model=None, steps=3, batch_size=3, max_length=192, learning_rate=1e-3, bf16=False,
        gradient_checkpointing=False, output=tmp_path / "output",
    )  # fmt: skip


def test_a_function_is_split_after_its_docstring(example, monkeypatch):
    # A form feed ends no line, for Python.
    source = b'import os\n\x0c\n@cached\ndef f(x):\n    """What\n    it does."""\n    return x\n\ndef g(): pass\n'
    monkeypatch.setattr(example, "stdlib_documents", lambda: [("f.py", source)])
    assert list(example.functions()) == [('def f(x):\n    """What\n    it does."""\n', "    return x\n")]


def test_prompts_have_no_label_and_long_documents_are_left_out(example, monkeypatch):
    pairs = [("ab", "c"), ("x" * 20, "y"), ("d", "ef")]
    monkeypatch.setattr(example, "functions", lambda: iter(pairs))
    boundary = example.BOUNDARY
    tokenize = example.load_tokenizer(None)
    assert example.load_examples(tokenize, 2, 10) == [
        {"input_ids": [boundary, 97, 98, 99, boundary], "labels": [-100, -100, -100, 99, boundary]},
        {"input_ids": [boundary, 100, 101, 102, boundary], "labels": [-100, -100, 101, 102, boundary]},
    ]
    with pytest.raises(ValueError, match="3 documents wanted, of at most --max_length=10 tokens there are 2"):
        example.load_examples(tokenize, 3, 10)


def test_packed_and_padded_batches_hold_the_same_documents(example):
    examples = example.load_examples(example.load_tokenizer(None), 3, 192)
    packed, padded = DataCollatorWithFlattening()(examples), example.pad(examples)
    is_valid = padded["attention_mask"].bool()
    assert is_valid.sum() < is_valid.numel()
    for name in ("input_ids", "labels"):
        assert torch.equal(packed[name][0], padded[name][is_valid])
    assert (padded["labels"][~is_valid] == -100).all()
    assert packed["position_ids"][0].tolist() == (is_valid.cumsum(1) - 1)[is_valid].tolist()


def test_documents_that_see_each_other_miss_the_bar(example, arguments, tmp_path, capsys):
    examples = example.load_examples(example.load_tokenizer(None), 9, arguments.max_length)

    def learn(attention, collate):
        model = example.load_model(None, attention, arguments.max_length, "cpu")
        options = example.training_arguments(arguments, False, "cpu", str(tmp_path))
        return example.train(model, examples, collate, options)

    def one_document(examples):
        batch = DataCollatorWithFlattening()(examples)
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    eager = learn("eager", example.pad)
    for collate, status in ((DataCollatorWithFlattening(), 0), (one_document, 1)):
        histories = {example.OURS: learn(example.OURS, collate), "eager": eager}
        assert example.report(histories, eager.losses) == status
        assert ("MISSED" in capsys.readouterr().out) == bool(status)
    assert histories[example.OURS].tokens == eager.valid_tokens
    assert eager.padding() > 0


def test_difference_keeps_nan(example):
    assert example.largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert math.isnan(example.largest_difference([1.0, math.nan], [1.0, 2.5]))


def test_rate_leaves_out_padding_and_the_first_step(example):
    history = example.History([1.0] * 3, valid_tokens=[90, 10, 20], tokens=[100, 40, 20], ends=[5.0, 6.0, 8.0])
    assert history.tokens_per_second() == 10
    assert history.padding() == 0.25


def test_missing_accelerate_is_named(example, arguments, monkeypatch):
    monkeypatch.setattr(example, "is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match="needs accelerate"):
        example.run(arguments)


def test_saved_model_is_tuned_and_saved(example, arguments, tmp_path, capsys):
    arguments.model = tmp_path / "model"
    example.load_model(None, "eager", 192, "cpu").save_pretrained(arguments.model)
    words = {word: number for number, word in enumerate(["<end>", "<unknown>", "self", "return", "(", ")", "."])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Whitespace()
    without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>")
    without_end.save_pretrained(arguments.model)
    with pytest.raises(ValueError, match="has no eos_token"):
        example.run(arguments)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>", eos_token="<end>")
    fast.save_pretrained(arguments.model)
    prompt, answer = example.load_tokenizer(arguments.model)("return self", "(self)")
    assert (prompt, answer) == ([3, 2], [4, 2, 5, 0])
    assert example.run(arguments) == 0
    assert capsys.readouterr().out.rstrip().endswith("ok")
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (arguments.model, arguments.output))
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        *(
            pytest.param(flags, marks=pytest.mark.slow, id="-".join(flags))
            for flags in (["--bf16"], ["--gradient_checkpointing"], ["--bf16", "--gradient_checkpointing"])
        ),
    ],
)
def test_example_runs_as_it_stands(flags):
    arguments = ["--steps", "3", "--batch_size", "3", "--max_length", "192", *flags]
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "finetune_packed.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines() if re.search(r"\d\.\d\dx ", line)}
    assert list(rows) == ["modelopt_triton", "sdpa", "eager"]
    assert [row[1] for row in rows.values()] == ["packed", "padded", "padded"]
    assert rows["modelopt_triton"][2] == "0%"
    assert rows["eager"][2] != "0%"
    bound = torch.finfo(torch.bfloat16).eps if "--bf16" in flags else 256 * torch.finfo(torch.float32).eps
    assert float(rows["modelopt_triton"][6]) < bound
    assert run.stdout.rstrip().endswith("ok")
