"""What `sparsify` accepts, and the errors by name for what it does not."""

import pytest
import torch
from torch import nn

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.config import CalibrationConfig, FlashSkipSoftmaxConfig, SparseAttentionConfig
from tests.models.tiny import tiny_model
from tests.sparsity.models import config_of, sharp_model

NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"treshold": 0.1}, "unknown field 'treshold'"),
        ({"method": "top_k"}, "method: 'top_k' given; registered are flash_skip_softmax"),
        ({"backend": "cuda"}, "backend: 'cuda' given"),
        ({"br": 48}, "br: 48 given"),
        ({"thresholds": {"prefill": [1.0]}}, r"thresholds\['prefill'\]: 1.0 given"),
        ({"thresholds": {"decode": [0.0]}}, r"thresholds\['decode'\]: 0.0 given"),
        ({"thresholds": {"decoding": [0.1]}}, "unknown field 'decoding'"),
        ({"thresholds": {"prefill": [0.1, 0.2]}}, "2 numbers given; accepted are 1 and 4"),
        ({"thresholds": {}}, "the module would run dense"),
        ({"enable": "yes"}, "enable: 'yes' given"),
        ({"is_causal": False}, "is_causal: False given; the module has True"),
    ],
)
def test_refuses_fields_by_name_and_leaves_the_model(fields, message):
    model = sharp_model()
    with pytest.raises(ValueError, match=message):
        mtsa.sparsify(model, config_of(**fields))
    assert not mtsa.is_attn_sparsified(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparse": {}}, "unknown field 'sparse'"),
        ({}, 'no "sparse_cfg" given'),
        (config_of("*mlp*"), r"'\*mlp\*' matches none .*: model.layers.0.self_attn, model.layers.1.self_attn"),
        (config_of(lambda name: False), "matches none"),
        (config_of(calibration={"target": 0.5}), "calibration: unknown field 'target'"),
        (config_of(calibration={"target_sparse_ratio": {"prefill": 1.0}}), "accepted are numbers in"),
        (config_of(calibration={}), "forward_loop: none given, with a calibration"),
    ],
)
def test_refuses_configurations_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        mtsa.sparsify(sharp_model(), config)


def test_refuses_a_forward_loop_without_calibration():
    with pytest.raises(ValueError, match="calibration: none given, with a forward_loop"):
        mtsa.sparsify(sharp_model(), config_of(), ["text"])


def test_refuses_two_backends_in_one_model():
    layers = {"*0*": {"backend": "pytorch"}, "*1*": {"backend": "triton"}}
    with pytest.raises(ValueError, match="pytorch and triton given"):
        mtsa.sparsify(sharp_model(), {"sparse_cfg": layers})


def test_refuses_a_model_without_the_attention_interface():
    with pytest.raises(ValueError, match="Linear: none of its modules calls"):
        mtsa.sparsify(nn.Linear(2, 2), config_of())


def test_the_attention_implementation_must_take(monkeypatch):
    model = sharp_model()
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn \(LlamaAttention\): .* stays 'eager'"):
        mtsa.sparsify(model, config_of())
    assert not mtsa.is_attn_sparsified(model)


@pytest.mark.parametrize("config", [{}, {"default": {"enable": True}}, {"calibration": {}}])
def test_no_layers_warns_and_leaves_the_model(config):
    model = sharp_model()
    with pytest.warns(UserWarning, match="no pattern given"):
        mtsa.sparsify(model, {"sparse_cfg": config})
    assert not mtsa.is_attn_sparsified(model)


def test_disabled_layers_are_named():
    with pytest.warns(UserWarning, match="disabled, so dense, are model.layers.0.self_attn"):
        mtsa.sparsify(sharp_model(), {"sparse_cfg": {"*attn*": {}, "*0*": {"enable": False}}})


def test_default_comes_first_and_the_last_match_wins_field_by_field():
    config = SparseAttentionConfig.of(
        {"sparse_cfg": {"*": {"br": 32}, "*1*": {"br": 16, "bc": 16}, "default": {"bc": 64, "collect_stats": True}}}
    )
    assert config.fields_of(NAMES[0]) == {"br": 32, "bc": 64, "collect_stats": True}
    assert config.fields_of(NAMES[1]) == {"br": 16, "bc": 16, "collect_stats": True}


def test_callables_and_dataclasses_are_accepted():
    model = mtsa.sparsify(sharp_model(), {"sparse_cfg": {NAMES.__contains__: FlashSkipSoftmaxConfig(br=16)}})
    assert list(mtsa.block_counts(model)) == NAMES


@pytest.mark.parametrize("preset", ["SKIP_SOFTMAX_DEFAULT", "SKIP_SOFTMAX_CALIB"])
def test_presets_are_valid(preset):
    config = SparseAttentionConfig.of(getattr(mtsa, preset))
    FlashSkipSoftmaxConfig(**config.fields_of(NAMES[0]))
    assert isinstance(config.calibration, CalibrationConfig) == (preset == "SKIP_SOFTMAX_CALIB")


def test_modules_that_call_the_interface_are_found_in_bert():
    model = mtsa.sparsify(tiny_model("bert", "eager"), mtsa.SKIP_SOFTMAX_DEFAULT)
    assert list(mtsa.block_counts(model)) == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]


def test_a_method_must_supply_what_is_abstract():
    class Empty(mtsa.SparseAttentionMethod):
        pass

    assert Empty.__abstractmethods__ == {"name", "calculate_sparsity", "apply_sparsity", "get_threshold_info"}
    with pytest.raises(TypeError, match="abstract"):
        Empty(FlashSkipSoftmaxConfig(), 4, torch.device("cpu"))


def test_versions_of_a_method():
    method = mtsa.get_sparse_method("flash_skip_softmax")
    assert mtsa.get_sparse_method("flash_skip_softmax", "v1") is method
    with pytest.raises(ValueError, match="version: 'v9' of 'flash_skip_softmax' given; registered are v1"):
        mtsa.get_sparse_method("flash_skip_softmax", "v9")
