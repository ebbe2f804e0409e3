"""Saving, loading and restoring, and what other producers write."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.curves import Calibrated, ShareCurve
from tests.sparsity.models import config_of, logits, sharp_model, tokens

A, B, TARGET = 2.0, 3.0, 0.4
FACTORS = {"a": A, "b": B}
CURVE = ShareCurve(
    (0.01, 0.1, 0.3, 0.9),
    (64.0, 128.0, 256.0),
    ((0.1, 0.2, 0.3, 0.4), (0.1, 0.3, 0.5, 0.6), (0.2, 0.4, 0.6, 0.8)),
    256.0,
)
FORMULA = "a * exp(b * target_sparsity)"


def calibrated_model(**fields):
    """As a calibration would leave it."""
    model = mtsa.sparsify(sharp_model(), config_of(**fields))
    for method in sparse_methods(model).values():
        method.set_calibrated({"prefill": Calibrated.of(CURVE, TARGET), "decode": Calibrated.of(CURVE, 0.5)})
    mtsa.enable_sparse_attention(model)  # writes the configuration
    return model


def saved_and_loaded(model, path):
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("make", [calibrated_model, lambda: mtsa.sparsify(sharp_model(), config_of())])
def test_saved_loaded_and_restored_is_the_same_bit_for_bit(make, tmp_path):
    model, ids = make(), tokens()
    mtsa.set_thresholds(model, {"prefill": [0.1, 0.2, 0.3, 0.7]}, "*1*")
    sparse, exported = logits(model, ids), mtsa.export_sparse_attention_config(model)
    loaded = saved_and_loaded(model, tmp_path)
    assert not mtsa.is_attn_sparsified(loaded)
    assert not torch.equal(logits(loaded, ids), sparse)
    assert mtsa.restore_sparse_attention(loaded) is loaded
    assert torch.equal(logits(loaded, ids), sparse)
    assert mtsa.export_sparse_attention_config(loaded) == exported


def test_a_disabled_module_stays_disabled(tmp_path):
    model, ids = calibrated_model(), tokens()
    mtsa.disable_sparse_attention(model, "*0*")
    sparse = logits(model, ids)
    loaded = saved_and_loaded(model, tmp_path)
    with pytest.warns(UserWarning, match=r"disabled, so dense, are model\.layers\.0\.self_attn"):
        mtsa.restore_sparse_attention(loaded)
    assert torch.equal(logits(loaded, ids), sparse)


def test_what_other_readers_find(tmp_path):
    model = calibrated_model()
    mtsa.disable_sparse_attention(model, "*0*")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["sparse_attention_config"]
    assert saved == mtsa.export_sparse_attention_config(model)
    group = saved["config_groups"]["group_0"]
    assert group["algorithm"] == "skip_softmax"
    assert group["targets"] == ["LlamaAttention"]
    assert group["ignore"] == ["model.layers.0.self_attn"]
    assert group["target_sparsity"] == {"prefill": TARGET, "decode": 0.5}
    factors = group["threshold_scale_factor"]
    assert factors["formula"] == FORMULA
    # λ as they compute it is ours at the longest calibrated length
    own = Calibrated.of(CURVE, TARGET)
    theirs = factors["prefill"]["a"] * math.exp(factors["prefill"]["b"] * TARGET) / 256
    assert theirs == pytest.approx(own.threshold(256))
    assert saved["fa_ops"]["block"] == [16, 16]


NEW = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "ignore": ["model.layers.1.self_attn"],
            "threshold_scale_factor": {"formula": FORMULA, "prefill": FACTORS, "decode": FACTORS},
            "target_sparsity": {"prefill": TARGET, "decode": TARGET},
        }
    },
    "producer": {"name": "another", "version": "1"},
}
OLDER = {
    "sparse_algo": "softmax_skip",
    "threshold_scale_factor": {"formula": FORMULA, "prefill": FACTORS, "decode": FACTORS},
}
LOG_A = {**OLDER, "threshold_scale_factor": {"prefill": {"log_a": math.log(A), "b": B}}}


@pytest.mark.filterwarnings("ignore:sparse attention. disabled")
@pytest.mark.parametrize(
    ("saved", "targets", "enabled"),
    [
        (NEW, {"prefill": TARGET, "decode": TARGET}, [True, False]),
        (OLDER, {"prefill": 0.5, "decode": 0.5}, [True, True]),
        (LOG_A, {"prefill": 0.5}, [True, True]),
    ],
    ids=["new", "older", "log_a"],
)
def test_what_other_producers_write(saved, targets, enabled):
    model = sharp_model()
    model.config.sparse_attention_config = saved
    with pytest.warns(UserWarning, match="not written by fa_ops.*blocks of 64 x 128"):
        mtsa.restore_sparse_attention(model)
    methods = list(sparse_methods(model).values())
    assert [method.is_enabled for method in methods] == enabled
    for phase, target in targets.items():
        own = methods[0].calibrated[phase]
        assert own.threshold(1000) == pytest.approx(A * math.exp(B * target) / 1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 given; this version has 1"),
        ({"order": "descending"}, "order 'descending' given; this version has"),
        ({"modules": {"model.layers.7.self_attn": {}}}, "module 'model.layers.7.self_attn' given"),
        ({"modules": {"model.layers.0.self_attn": {"share": 1}}}, "unknown field 'share'"),
    ],
)
def test_refuses_by_name_what_it_cannot_restore(change, message):
    exported = mtsa.export_sparse_attention_config(calibrated_model())
    model = sharp_model()
    model.config.sparse_attention_config = {**exported, "fa_ops": {**exported["fa_ops"], **change}}
    with pytest.raises(ValueError, match=message):
        mtsa.restore_sparse_attention(model)
    assert not mtsa.is_attn_sparsified(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"sparse_algo": "n_m"}, "algorithm 'n_m' given"),
        ({**OLDER, "targets": ["GemmaAttention"]}, r"\['GemmaAttention'\] given; the model has \['LlamaAttention'\]"),
        ({**OLDER, "threshold_scale_factor": {"formula": "a + b", "prefill": FACTORS}}, "formula 'a [+] b' given"),
        ({**OLDER, "threshold_scale_factor": {"prefill": {"a": 1.0}}}, "with a and b"),
        (None, "nothing to restore"),
    ],
)
def test_refuses_by_name_what_others_may_write(saved, message):
    model = sharp_model()
    model.config.sparse_attention_config = saved
    with pytest.raises(ValueError, match=message):
        mtsa.restore_sparse_attention(model)
