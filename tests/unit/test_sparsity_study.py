"""`examples/benchmarks/sparsity_study.py`: its attention is the op's, its arithmetic, a run on a tiny model."""

import importlib
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fa_ops.reference import attention_reference
from fa_ops_meta.skip import DECODE_SEGMENT, VISIT_ORDERS

transformers = pytest.importorskip("transformers")
np = pytest.importorskip("numpy")
FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
MODULES = ("study_attention", "study_allocation", "study_loss", "study_report", "study_train", "sparsity_study")


@pytest.fixture(scope="module")
def study():
    """The study's modules, importable only while the tests of this file run."""
    pytest.importorskip("matplotlib")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER.parent))
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def tensors(length, heads=(4, 2), dim=16):
    """q, k, v (1, length, H, D), and a dimension in which blocks of 16 keys differ for all queries alike."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, count, dim, generator=generator) for count in (heads[0], heads[1], heads[1]))
    q[..., 0] = 4.0
    k[..., 0] = 4.0 * torch.randn(length // 16 + 1, 1, generator=generator).repeat_interleave(16, 0)[:length]
    return q, k, v


def attend(study, skip, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return study.study_attention.study_attention(SimpleNamespace(layer_idx=0), q, k, v, None, study=skip)[0]


@pytest.mark.parametrize("order", VISIT_ORDERS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_attention_is_that_of_the_reference(study, order, phase):
    length, (br, bc), threshold = 200, (32, 16), 0.05
    q, k, v = tensors(length)
    setting = study.study_attention.Setting(order, phase, br if phase == "prefill" else 1, bc)
    skip = study.study_attention.Skip(setting, torch.full((1, 4), threshold).log(), 1)
    out = attend(study, skip, q, k, v)
    options = {"skip_softmax_threshold": threshold, "skip_softmax_block": (br, bc), "order": order}
    if phase == "prefill":
        expected, counts = attention_reference(
            q, k, v, torch.tensor([0]), torch.tensor([length]), return_skip_counts=True, **options
        )
    else:  # a sequence for each row
        starts, keys = torch.arange(length), torch.arange(1, length + 1)
        expected, counts = attention_reference(
            q[0], k[0], v[0], starts, torch.ones_like(keys), None, True, None, torch.zeros_like(keys), keys,
            return_skip_counts=True, **options,
        )  # fmt: skip
    visited, dropped = counts.sum((1, 2)).tolist()
    assert 0.05 < dropped / visited < 0.95
    assert skip.counts[:, 0].tolist() == [visited, dropped]
    assert torch.allclose(out.squeeze(0), expected.view(length, 4, 16), atol=1e-5)


def test_decoding_follows_segments(study):
    """The last row of a long sequence, whose later segments start anew from the first block."""
    length = DECODE_SEGMENT + 160
    q, k, v = tensors(length, (2, 1))
    k[:, -32:, :, 0] = 12.0  # the largest scores, in the last segment
    setting = study.study_attention.Setting("first_then_descending", "decode", 1, 32)
    scores = torch.einsum("bqhd,bkgd->bhqk", q[:, -1:], k) / 4
    mask = torch.ones(1, length, dtype=torch.bool)
    margins, is_visited = setting.margins(scores, mask)
    dropped = setting.dropped(margins, is_visited, torch.full((2,), 0.05).log())
    _, counts = attention_reference(
        q[0, -1:], k[0], v[0], torch.tensor([0]), torch.tensor([1]), None, True, None,
        torch.tensor([0]), torch.tensor([length]), skip_softmax_threshold=0.05, skip_softmax_block=(16, 32),
        return_skip_counts=True, order=setting.order,
    )  # fmt: skip
    assert dropped.sum((2, 3))[0].tolist() == counts[1, 0].tolist()
    assert 0 < counts[1].sum() < counts[0].sum()
    whole = setting._replace(phase="prefill")
    assert whole.dropped(*whole.margins(scores, mask), torch.full((2,), 0.05).log()).sum() != dropped.sum()


def test_counting_predicts_what_a_threshold_drops(study):
    q, k, v = tensors(200)
    settings = [study.study_attention.Setting(order, "prefill", 16, 16) for order in VISIT_ORDERS]
    margins = study.study_attention.Margins(settings, 1, 4)
    dense = attend(study, margins, q, k, v)
    nothing = study.study_attention.Skip(settings[0], torch.full((1, 4), -math.inf), 1)
    assert torch.equal(dense, attend(study, nothing, q, k, v))
    for setting in settings:
        reach = study.study_allocation.Reach.of(margins.counts[setting])
        ln_threshold = reach.ln_threshold(0.3)
        skip = study.study_attention.Skip(setting, torch.full((1, 4), ln_threshold), 1)
        attend(study, skip, q, k, v)
        assert skip.counts[0].item() == reach.blocks
        assert margins.counts[setting][1].sum().item() == pytest.approx(4 * 200, rel=1e-4)  # heads, rows
        assert skip.counts[1].item() / reach.blocks == pytest.approx(min(0.3, reach.largest), abs=0.01)


def test_the_cheapest_shares_equalise_marginal_losses(study):
    allocation, cheapest = study.study_allocation, study.study_allocation.cheapest_shares
    cheap = allocation.Sensitivity([0.0, 0.5, 0.9], [0.0, 0.1, 0.5], 100)
    dear = allocation.Sensitivity([0.0, 0.5, 0.9], [0.0, 1.0, 9.0], 100)
    assert cheapest([cheap, dear], 0.25) == pytest.approx([0.5, 0.0])
    assert cheapest([dear, cheap], 0.5) == pytest.approx([0.1, 0.9])
    assert cheapest([cheap, dear._replace(blocks=300)], 0.25) == pytest.approx([0.5, 1 / 6])


def test_a_hull_is_convex_and_keeps_the_ends(study):
    points = [(0.0, 0.0), (0.3, 0.2), (0.5, -0.1), (0.7, 0.3), (0.9, 0.4)]
    hull = study.study_allocation.convex_hull(points)
    assert hull == [(0.0, 0.0), (0.5, -0.1), (0.9, 0.4)]


def test_differences_are_taken_at_the_same_share(study):
    nats, visited = np.linspace(50, 60, 16), np.full(16, 100.0)
    losses_of = study.study_loss.Losses
    curve = [losses_of(nats + 40 * share, visited, visited * share) for share in (0.0, 0.4, 0.8)]
    bootstrap = study.study_loss.Bootstrap(study.study_loss.Windows(torch.zeros(16, 9), np.full(16, 8.0)))
    on_it = losses_of(nats + 40 * 0.6, visited, visited * 0.6)
    assert bootstrap.against(on_it, curve) == pytest.approx((0, 0, 0), abs=1e-9)
    above = bootstrap.against(on_it._replace(nats=on_it.nats + 8 * math.log(2)), curve)
    assert above == pytest.approx((1, 1, 1), abs=1e-9)
    assert bootstrap.against(losses_of(nats, visited, visited * 0.9), curve) is None
    low, high = bootstrap.added(losses_of(nats + np.linspace(-1, 1, 16), visited, visited), curve[0])[1:]
    assert low < 0 < high


@pytest.fixture
def checkpoint(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    config.byte_level = True
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(4000)))
    return tmp_path / "model"


def arguments(checkpoint, *more):
    return [
        "--device", "cpu", "--checkpoint", str(checkpoint), "--text", str(checkpoint.parent / "text.txt"),
        "--output", str(checkpoint.parent), "--windows", "4", "--calibration-windows", "2",
        "--blocks", "16x16", "32x32", "--orders", "first_then_descending", "ascending",
        "--shares", "0.3", "0.99", "--thresholds", "0.1", "--allocations", "loss_by_layer", "equal_attention", *more,
    ]  # fmt: skip


def test_smoke(study, checkpoint, monkeypatch):
    monkeypatch.setenv("FA_OPS_COMMIT", "abc123")
    assert study.sparsity_study.main(arguments(checkpoint)) == 0
    rows = study.study_report.read(checkpoint.parent / "sparsity-study.csv")
    of = {name: [row for row in rows if row["allocation"] == name] for name in {row["allocation"] for row in rows}}
    assert {row["commit"] for row in rows} == {"abc123"}
    for op, own in zip(of["op"], of["study"], strict=True):
        assert 0 < op["share"] == own["share"] < 1
        assert own["bits_per_byte"] == pytest.approx(op["bits_per_byte"], abs=1e-3)
    assert len(of["uniform"]) == 2 * 2 * (2 + 2)
    assert len(of["loss_by_layer"]) == len(of["equal_attention"]) == 2 * 2 * 2
    assert all("skipped" in row for row in of["uniform"] if row["wanted"] == 0.99)
    measured = [row for row in of["uniform"] + of["loss_by_layer"] + of["equal_attention"] if "share" in row]
    assert any(abs(row["share"] - 0.3) < 0.1 for row in measured)
    assert all(row["added_low"] <= row["added"] <= row["added_high"] for row in measured)
    assert all(row["base"] == "uniform" for row in of["loss_by_layer"] if "versus_base" in row)
    report = (checkpoint.parent / "sparsity-study.md").read_text()
    assert "first_then_descending" in report
    assert "loss_by_layer" in report
    assert (checkpoint.parent / "sparsity-study.png").stat().st_size > 10_000


def test_the_time_limit_is_reported(study, checkpoint):
    assert study.sparsity_study.main(arguments(checkpoint, "--time-limit", "-1")) == 0
    rows = study.study_report.read(checkpoint.parent / "sparsity-study.csv")
    assert sum("skipped" in row for row in rows) == 8 + 6 + 2 * 4
    assert (
        "not run: the time limit of -1 s had passed: 22 rows" in (checkpoint.parent / "sparsity-study.md").read_text()
    )


def test_the_time_limit_ends_rows_and_allocations_midway(study, checkpoint, monkeypatch):
    """It passes at a check within the losses by layer."""
    calls = itertools.count()
    monkeypatch.setattr(study.sparsity_study.Study, "is_late", lambda self: next(calls) >= 6)
    options = ["--orders", "first_then_descending", "--blocks", "16x16", "--phases", "prefill", "--shares", "0.02"]
    assert study.sparsity_study.main(arguments(checkpoint, *options)) == 0
    rows = study.study_report.read(checkpoint.parent / "sparsity-study.csv")
    skipped = {row["allocation"] for row in rows if "skipped" in row}
    assert skipped == {"loss_by_layer", "fixed"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--train", "--device", "cpu"], "--train: given on a CPU"),
        (["--device", "cpu", "--checkpoint", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_refusals(study, given, message, capsys):
    with pytest.raises(SystemExit):
        study.sparsity_study.main(given)
    assert message in capsys.readouterr().err


@pytest.mark.slow  # it compiles
def test_training_writes_a_checkpoint_that_the_study_loads(study, tmp_path):
    preset = study.study_train.train_small_lm.Preset(32, 64, 2, 2, 1, context=64, batch_size=2, learning_rate=1e-3)
    (tmp_path / "text.txt").write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(4000)))
    bits = study.study_train.train(tmp_path / "text.txt", tmp_path / "model", preset, 1.0, 3)
    assert 0 < bits < 20
    model = study.sparsity_study.load_model(tmp_path / "model", "cpu")
    assert model.config.byte_level
    assert model.config.max_position_embeddings == 64
