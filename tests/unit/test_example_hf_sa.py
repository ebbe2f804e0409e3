"""`examples/hf_sa.py`: what it prints of a tiny random model, and that it would see a model that runs dense."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.config import CalibrationConfig, FlashSkipSoftmaxConfig
from tests.sparsity.models import sharp_model

ROOT = Path(__file__).parents[2]
SEQ_LEN = 128
SHORT = ["--seq_len", str(SEQ_LEN), "--max_new_tokens", "6"]
CALIBRATED = ["--sparse_attn", "skip_softmax_calib", "--calib_samples", "4"]
README_BEGIN, README_END = "<!-- flags of hf_sa.py -->\n", "<!-- end of the flags -->"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import hf_sa

    for name, value in {
        "ROUNDS": 1,
        "MEASURED_TOKENS": 2 * SEQ_LEN,
        "QUALITY_TARGETS": (0.1,),
        "QUALITY_THRESHOLDS": (0.1,),
    }.items():
        monkeypatch.setattr(hf_sa, name, value)
    return hf_sa


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sharp_model(vocab_size=264).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Runs of one byte: neighbouring rows agree about a block."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(draw.choice("abcdefghij \n") * 12 for _ in range(50)))
    return folder


@pytest.fixture
def flags(model_folder, text_folder, tmp_path):
    return ["--pyt_ckpt_path", str(model_folder), "--text", str(text_folder), "--output", str(tmp_path), *SHORT]


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
@pytest.mark.parametrize("preset", [[], [*CALIBRATED, "--target_sparse_ratio", "0.15"]], ids=["fixed", "calibrated"])
@pytest.mark.filterwarnings("ignore:calibration")
def test_each_backend_with_each_preset(example, flags, tmp_path, capsys, preset, backend):
    assert example.main([*flags, *preset, "--backend", backend]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed
    assert "attention sdpa; no tokenizer, so byte-level" in printed
    assert f"backend {backend}, blocks of 16 x 16" in printed
    assert "2 windows of 128 held-out tokens, the last 6 decoded" in printed
    assert re.search(r"^  before  '.*'\n  after   '.*'\n  \d of 6 tokens agree", printed, re.MULTILINE)
    for phase in ("prefill", "decode"):
        losses = re.search(rf"^{phase} loss, bits per byte +([\d.]+) +([\d.]+) ", printed, re.MULTILINE)
        assert 5 < float(losses[1]) < 40
        assert losses[1] != losses[2], "it runs dense"
        assert re.search(rf"^{phase}.*, batch of 2, ms .* \d+\.\d\dx (slower|faster)$", printed, re.MULTILINE)
        share = re.search(rf"^{phase}: ([\d.]+)% of \d+ blocks dropped(.*)$", printed, re.MULTILINE)
        assert 0 < float(share[1]) < 95
        assert share[2] == (", 15.0% wanted" if preset else "")
    pictures = {"dropped-shares.png", "quality.png", *(["calibration.png"] if preset else [])}
    assert {path.name for path in tmp_path.iterdir()} == pictures


def test_a_model_that_drops_nothing_is_said_to_run_dense(example, flags, monkeypatch, capsys):
    never = {"sparse_cfg": {"*": {"thresholds": {"prefill": [1e-30], "decode": [1e-30]}}}}
    monkeypatch.setitem(example.SPARSE_ATTENTIONS, "skip_softmax", never)
    monkeypatch.setattr(example, "QUALITY_THRESHOLDS", (1e-30,))
    drawn = []
    monkeypatch.setattr("fa_ops.sparsity.plots.plot_quality", lambda *args, **kwargs: drawn.append(args))
    assert example.main(flags) == 0
    ((shares, losses, dense_loss, _),) = drawn
    assert shares == [0]
    assert losses == pytest.approx([dense_loss], rel=1e-4), "of other tokens"
    printed = capsys.readouterr().out
    for phase in ("prefill", "decode"):
        assert f"{phase}: 0 % dropped: this model runs dense" in printed
    assert "6 of 6 tokens agree, the first 6 in a row" in printed


def test_exported_model_is_loaded_again_and_compared(example, flags, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sparse"
    run = [*flags, "--backend", "triton", "--export_dir", str(folder)]
    assert example.main(run) == 0
    assert "restored, the same logits and dropped blocks to the bit; " in capsys.readouterr().out
    again = mtsa.restore_sparse_attention(example.load_model(folder, torch.device("cpu")))
    assert example.rules_of(again)["prefill"] == {"thresholds": [0.1]}

    def restore_another(model):
        mtsa.set_thresholds(restore(model), {"prefill": [0.3]})
        return model

    restore = mtsa.restore_sparse_attention
    monkeypatch.setattr(mtsa, "restore_sparse_attention", restore_another)
    assert example.main(run) == 1
    assert "NOT the same logits and dropped blocks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pyt_ckpt_path", "nowhere"], "--pyt_ckpt_path: got nowhere, accepted is a folder with a saved model"),
        (["--text", "nowhere"], "--text: got nowhere, accepted is a file or a folder"),
        (["--sparse_attn", "top_k"], "--sparse_attn: invalid choice: 'top_k'"),
        (["--backend", "cuda"], "--backend: invalid choice: 'cuda'"),
        (["--br", "48"], "--br: invalid choice: 48"),
        (["--seq_len", "0"], "--seq_len: got 0, accepted is 1 or more"),
        (["--max_new_tokens", "1"], "--max_new_tokens: got 1, accepted is 2 or more"),
        (["--temperature", "0"], "--temperature: got 0.0, accepted is a positive number"),
        ([*CALIBRATED, "--target_sparse_ratio", "1"], "--target_sparse_ratio: got 1.0, accepted is a number in (0, 1)"),
        (["--calib_samples", "4"], "--calib_samples: calibrates, accepted is --sparse_attn skip_softmax_calib with it"),
    ],
)
def test_bad_flags_are_named_with_what_is_accepted(example, flags, given, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        example.parse_arguments([*flags, *given])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_model_does_not_allow_is_named(example, flags, text_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="--max_new_tokens: got 257, accepted is at most half of --seq_len=512"):
        example.main([*flags, "--seq_len", "2048", "--max_new_tokens", "257"])
    assert "--seq_len: 2048 wanted, cut to the model's max_position_embeddings of 512" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no tokenizer, and a vocabulary of 256"):
        example.load_tokenizer(tmp_path, 256)
    with pytest.raises(ValueError, match=r"--text: .* tokens are held out, accepted are --seq_len=5000 or more"):
        example.load_text(text_folder, example.load_tokenizer(tmp_path, 257), 5000, 0)
    assert example.main([*flags, *CALIBRATED, "--target_sparse_ratio", "0.95"]) == 1
    assert (
        "target_sparse_ratio['prefill']: 0.95 given; the largest share seen, at λ = 0.99, is" in capsys.readouterr().err
    )


def test_calibration_does_not_see_what_is_measured(example, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(bytes([number + 100]) * 60)
    text = example.load_text(tmp_path, example.load_tokenizer(tmp_path, 264), 48, samples=3)
    assert text.held_out.shape[1] == 48
    assert len(text.calibration) == 3 * example.DOCUMENTS_PER_SAMPLE
    assert all(document[0] == example.BOUNDARY for document in text.calibration)
    seen = {token for document in text.calibration for token in document} - {example.BOUNDARY}
    assert not seen & set(text.held_out.flatten().tolist())


def test_saved_tokenizer_is_used(example, tmp_path):
    words = {word: number for number, word in enumerate(["<begin>", "<unknown>", "a", "b"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>").save_pretrained(tmp_path)
    loaded = example.load_tokenizer(tmp_path, len(words))
    assert loaded.encode(b"a b c") == [2, 3, 1]
    assert loaded.decode([2, 3]) == "a b"
    assert loaded.saved is not None


def test_small_blocks_below_the_long_context(example, flags):
    arguments = example.parse_arguments(flags)
    library = FlashSkipSoftmaxConfig()
    assert example.block_size(arguments, 2048) == (library.br, library.bc)
    assert example.block_size(arguments, 2047) == (16, 16)
    assert example.block_size(example.parse_arguments([*flags, "--br", "32"]), 512) == (32, 16)


def test_tokens_that_agree_are_counted(example, tmp_path, capsys):
    tokenizer = example.load_tokenizer(tmp_path, 264)
    example.report_output(tokenizer, torch.tensor([65]), [66, 67, 68, 69], [66, 70, 68])
    assert "output behind 'A'\n  before  'BCDE'\n  after   'BFD'\n  2 of 4 tokens agree, the first 1 in a row" in (
        capsys.readouterr().out
    )


def test_slower_and_faster_are_called_so(example, capsys):
    dense, sparse = example.Behaviour([1.0, 2.0], [1.0, 3.0], []), example.Behaviour([1.5, 2.0], [1.5, 1.0], [])
    example.report(dense, sparse, example.Unit("nats per token", 1.0), 8, ("dense", "sparse"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:5]] == ["+0.5000", "+0.0000", "1.50x slower", "3.00x faster"]


def flag_table(parser) -> str:
    """What README.md has to say between its markers."""
    rows = ["| flag | meaning, and what it is without the flag |", "|---|---|"]
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or "N"
        name = action.option_strings[0] + ("" if action.nargs == 0 else f" {values}")
        rows.append(f"| `{name}` | {action.help} |")
    return "\n".join(rows) + "\n"


def test_readme_has_the_parsers_flags(example):
    readme = (ROOT / "README.md").read_text()
    assert flag_table(example.build_parser()) == readme.split(README_BEGIN)[1].split(README_END)[0]


def test_help_tells_the_defaults(example):
    actions = {action.dest: action for action in example.build_parser()._actions}
    calibration, layer = CalibrationConfig(), FlashSkipSoftmaxConfig()
    inherited = {
        "calib_samples": calibration.samples,
        "calib_chunk_size": calibration.chunk_size,
        "target_sparse_ratio": calibration.target_sparse_ratio["prefill"],
    }
    for name in ("sparse_attn", "backend", "seq_len", "max_new_tokens", "temperature"):
        assert actions[name].help.endswith(f"({actions[name].default})")
    for name, value in inherited.items():
        assert actions[name].help.endswith(f"({value})")
    for name in ("br", "bc"):
        assert f"({getattr(layer, name)}; 16 for less than {example.LONG_CONTEXT} tokens)" in actions[name].help
    assert actions["pyt_ckpt_path"].default == ROOT / "examples" / "output" / "model"


@pytest.mark.slow
def test_example_runs_as_it_stands(flags):
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "hf_sa.py", *flags, "--do_sample"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^prefill: [\d.]+% of \d+ blocks dropped$", run.stdout, re.MULTILINE)
