"""Calibration: the share that a model then drops, and the failures that say what to change."""

import builtins
import importlib
import re
import sys

import pytest
import torch

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import sparse_methods, state_of
from fa_ops.sparsity.config import CalibrationConfig
from fa_ops.sparsity.plots import plot_calibration, plot_dropped_shares, plot_quality
from fa_ops.sparsity.texts import token_windows
from tests.sparsity.models import config_of, logits, sharp_model, tokens

STREAM = tokens(6000, rows=1, seed=3)[0]
SETTINGS = {"max_seqlen": 256, "samples": 16, "min_tokens": 1, "num_decode_tokens": 6, "num_length_bins": 2}
TARGETS = {"prefill": 0.2, "decode": 0.5}
UNREACHABLE = (
    r"'prefill'\]: 0.9 given; the largest share seen, at λ = 0.99, is 0.\d+ at 256 keys, 0.\d+ at 128 keys: lower the "
    r"target, or use longer texts.* or smaller blocks"
)


def calibrated(texts=(STREAM,), targets=TARGETS, **settings):
    calibration = {**SETTINGS, "target_sparse_ratio": targets, **settings}
    return mtsa.sparsify(sharp_model(), config_of(calibration=calibration), texts)


@pytest.fixture(scope="module")
def model():
    return calibrated()


@pytest.mark.parametrize(
    ("min_tokens", "number"), [(1, 4), (1000, 7), (10**6, 46)], ids=["samples", "min_tokens", "all_of_the_text"]
)
def test_short_texts_are_more(min_tokens, number):
    config = CalibrationConfig(samples=4, min_tokens=min_tokens)
    windows = token_windows([STREAM], None, 10**6, config, [128])
    assert len(windows) == number
    assert {len(window) for window in windows} == {128}
    assert torch.equal(windows[0], STREAM[:128])
    assert torch.equal(windows[-1], STREAM[-128:])


@pytest.mark.parametrize("length", [128, 192, 256])
def test_drops_the_share_that_it_was_calibrated_for(model, length):
    stream = tokens(9000, rows=1, seed=length)[0]
    ids = torch.stack([stream[begin : begin + length + 8] for begin in range(0, 8000, 331)])
    with torch.no_grad(), mtsa.collect_stats(model):
        cache = model(ids[:, :length]).past_key_values
        for token in ids[:, length:].split(1, dim=1):
            cache = model(token, past_key_values=cache).past_key_values
    assert mtsa.dropped_share(model, "prefill") == pytest.approx(TARGETS["prefill"], abs=0.02)
    assert mtsa.dropped_share(model, "decode") == pytest.approx(TARGETS["decode"], abs=0.04)


def test_another_target_drops_another_share(model):
    before = state_of(model).calibration["prefill"].fit.target
    mtsa.set_target_sparse_ratio(model, {"prefill": 0.1})
    with mtsa.collect_stats(model):
        logits(model, tokens(258))
    assert 0.03 < mtsa.dropped_share(model, "prefill") < 0.15
    assert re.search(r"^prefill: .*% of \d+ blocks dropped, 10.0% wanted$", mtsa.summary(model), re.MULTILINE)
    mtsa.set_target_sparse_ratio(model, {"prefill": 0.2}, "*0*")
    assert re.search(r"^prefill: .* blocks dropped$", mtsa.summary(model), re.MULTILINE), (
        "the modules want different shares"
    )
    with pytest.warns(UserWarning, match=r"'prefill'\]: 0.95 given; calibration has seen 0.\d+ at most, at 256 keys"):
        mtsa.set_target_sparse_ratio(model, {"prefill": 0.95})
    mtsa.set_target_sparse_ratio(model, {"prefill": before})


def test_a_forward_loop_and_texts_as_bytes():
    looped = mtsa.sparsify(
        sharp_model(),
        config_of(calibration={"target_sparse_ratio": {"prefill": 0.2}}),
        lambda model: [model(tokens(256, seed=seed)) for seed in range(4)],
    )
    info = sparse_methods(looped)["model.layers.0.self_attn"].get_threshold_info()
    assert info["prefill"]["target"] == 0.2
    assert info["prefill"]["longest"] == 256
    assert info["decode"] is None
    wide = sharp_model(vocab_size=256)
    mtsa.sparsify(wide, config_of(), None)
    mtsa.calibrate(wide, {**SETTINGS, "target_sparse_ratio": {"decode": 0.3}}, ["any text will do. " * 60])
    assert sparse_methods(wide)["model.layers.0.self_attn"].get_threshold_info()["decode"]["target"] == 0.3


def test_attention_that_is_not_causal_is_run_at_each_length():
    model = sharp_model("bert")
    calibration = {**SETTINGS, "samples": 32, "target_sparse_ratio": {"prefill": 0.2}}
    mtsa.sparsify(model, config_of("*attention*", calibration=calibration), (STREAM,))
    assert list(state_of(model).calibration["prefill"].fit.curve.keys) == [128, 256]
    for length in (128, 256):
        ids = tokens(24 * length, rows=1, seed=length).view(24, length)
        with torch.no_grad(), mtsa.collect_stats(model):
            model(ids)
        assert mtsa.dropped_share(model, "prefill") == pytest.approx(0.2, abs=0.02)
    with pytest.raises(mtsa.CalibrationError, match=r"no decode call was counted; set target.*causal prefills"):
        mtsa.calibrate(model, {**calibration, "target_sparse_ratio": {"decode": 0.3}}, (STREAM,))


def test_chunks_do_not_change_a_calibration():
    fits = [state_of(calibrated(samples=8, chunk_size=size)).calibration["prefill"].fit for size in (2048, 40)]
    assert fits[0].a == pytest.approx(fits[1].a, rel=1e-3)
    assert fits[0].b == pytest.approx(fits[1].b, rel=1e-3)


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ((STREAM,), {"targets": {"prefill": 0.9}}, mtsa.CalibrationError, UNREACHABLE),
        (
            (STREAM[:100],),
            {},
            ValueError,
            "100 tokens given; max_seqlen needs 256: give more text, or a smaller max_seqlen",
        ),
        (("é",), {}, ValueError, "bytes of a text from 169 to 195 given; the vocabulary has 97; give a tokenizer"),
        ((STREAM[None],), {}, ValueError, r"token ids of shape \(1, 6000\) given"),
        (lambda model: None, {}, mtsa.CalibrationError, "no prefill call was counted; set target"),
        ((STREAM,), {"threshold_trials": (1e-6, 0.999)}, mtsa.CalibrationError, "points of prefill drop 10% to 90%"),
    ],
)
def test_failures_say_what_to_change_and_leave_the_model(texts, settings, error, message):
    model = sharp_model()
    targets = settings.pop("targets", TARGETS)
    calibration = {**SETTINGS, "target_sparse_ratio": targets, **settings}
    with pytest.raises(error, match=message):
        mtsa.sparsify(model, config_of(calibration=calibration), texts)
    assert not mtsa.is_attn_sparsified(model)
    assert model.config._attn_implementation == "eager"


def test_works_without_tqdm(monkeypatch):
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    calibrated(samples=2)


def test_pictures(model, tmp_path):
    with pytest.raises(ValueError, match="no blocks were counted"):
        plot_dropped_shares(mtsa.sparsify(sharp_model(), config_of()), tmp_path / "none.png")
    with mtsa.collect_stats(model):
        logits(model, tokens())
    plot_dropped_shares(model, tmp_path / "shares.png")
    plot_calibration(model, tmp_path / "calibration.png")
    plot_quality([0.3, 0.5], [1.01, 1.05], 1.0, tmp_path / "quality.png")
    for name in ("shares", "calibration", "quality"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_name_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fa_ops.sparsity.plots")
    with pytest.raises(ImportError, match=r"fa_ops\.sparsity\.plots needs matplotlib"):
        importlib.import_module("fa_ops.sparsity.plots")
