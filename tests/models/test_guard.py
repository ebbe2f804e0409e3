"""Only models whose attention is sure to call ours may have it: Transformers' own, and those of a user."""

import statistics
import time

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    BloomConfig,
    BloomModel,
    LlamaConfig,
    MPNetConfig,
    MPNetModel,
    PreTrainedConfig,
    PreTrainedModel,
    SamVisionConfig,
    SamVisionModel,
)
from transformers.masking_utils import causal_mask_function, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fa_ops
from fa_ops.integrations import huggingface_guard as guard
from fa_ops.integrations.huggingface_mask import triton_attention_mask
from tests.models.tiny import ATTENTION_NAME, batch_of, tiny_model

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(guard, "_vouched", set())
    monkeypatch.setattr(guard, "_admitted", set())


class UserConfig(PreTrainedConfig):
    model_type = "of-a-user"
    hidden_size = 32


class WithInterface(nn.Module):
    is_causal = True

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x, attention_mask):
        x = x[:, None]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return attend(self, x, x, x, attention_mask)[0][:, :, 0]


class WithSoftmax(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, x, attention_mask):
        scores = x @ x.transpose(1, 2)
        return torch.softmax(scores + attention_mask[:, 0], -1) @ x


class UserModel(PreTrainedModel):
    config_class = UserConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.attention = self.attention_class(config)

    def forward(self, x, attention_mask=None):
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None
        )
        return self.attention(x, mask)


class GoodConfig(UserConfig): ...


class BadConfig(UserConfig): ...


class MixedConfig(UserConfig): ...


class FunctionConfig(UserConfig): ...


class UnknownConfig(PreTrainedConfig): ...


class GoodModel(UserModel):
    config_class = GoodConfig

    def __init__(self, config):
        self.attention_class = WithInterface
        super().__init__(config)


class BadModel(UserModel):
    config_class = BadConfig

    def __init__(self, config):
        self.attention_class = WithSoftmax
        super().__init__(config)


class MixedModel(UserModel):
    config_class = MixedConfig

    def __init__(self, config):
        self.attention_class = WithInterface if config.hidden_size == 32 else WithSoftmax
        super().__init__(config)


class LlamaOfSomebody(UserModel):
    """Has Transformers' own configuration."""

    config_class = LlamaConfig

    def __init__(self, config):
        self.attention_class = WithSoftmax
        super().__init__(config)


def attend(x, mask):
    return torch.softmax(x @ x.transpose(1, 2) + mask[:, 0], -1) @ x


class FunctionModel(UserModel):
    """Its attention is no module."""

    config_class = FunctionConfig
    attention_class = nn.Identity

    def forward(self, x, attention_mask=None):
        return attend(x, create_causal_mask(self.config, x, attention_mask, None))


def with_our_attention(model_class, config_class):
    return model_class(config_class(attn_implementation=ATTENTION_NAME))


def test_a_users_model_that_calls_the_interface():
    x = torch.randn(2, 5, 32)
    ours = with_our_attention(GoodModel, GoodConfig)
    theirs = GoodModel(GoodConfig(attn_implementation="sdpa"))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(BadModel, BadConfig), (MixedModel, MixedConfig), (LlamaOfSomebody, LlamaConfig)],
)
def test_a_users_model_that_computes_attention_itself(model_class, config_class):
    message = rf"{model_class.__name__}: WithSoftmax computes attention itself.*vouch_for\({model_class.__name__}\)"
    with pytest.raises(NotImplementedError, match=message):
        with_our_attention(model_class, config_class)
    tiny_model("llama")(batch_of("none").ids)  # whoever else has the same configuration


@pytest.mark.parametrize(("model_class", "config_class"), [(BadModel, BadConfig), (MixedModel, MixedConfig)])
def test_a_name_that_is_set_behind_the_models_back(model_class, config_class):
    model = model_class(config_class())
    model.config._attn_implementation = ATTENTION_NAME
    with pytest.raises(NotImplementedError, match="WithSoftmax computes attention itself"):
        model(torch.randn(2, 5, 32))


def test_attention_that_is_no_module():
    model = with_our_attention(FunctionModel, FunctionConfig)
    with pytest.raises(NotImplementedError, match=r"FunctionModel: none of its parts calls .*vouch_for\(FunctionModel"):
        model(torch.randn(2, 5, 32))


def test_a_configuration_that_nobody_knows():
    arguments = {"batch_size": 1, "q_length": 3, "kv_length": 3, "mask_function": causal_mask_function}

    class Config:
        __module__ = "somewhere.else"

    with pytest.raises(NotImplementedError, match=r"Config: no model class with this configuration is known"):
        triton_attention_mask(**arguments, config=Config())
    fa_ops.vouch_for(Config)
    assert triton_attention_mask(**arguments, config=Config()) is not None


def test_a_class_that_somebody_vouches_for():
    fa_ops.vouch_for(MixedModel)
    model = with_our_attention(MixedModel, MixedConfig)
    assert model(torch.randn(2, 5, 32)).isfinite().all()
    with pytest.raises(NotImplementedError, match="BadModel"):
        with_our_attention(BadModel, BadConfig)
    with pytest.raises(TypeError, match="model_class: 'MixedModel' given; expected a model or configuration class"):
        fa_ops.vouch_for("MixedModel")


@pytest.mark.parametrize(("model_class", "config_class"), [(MPNetModel, MPNetConfig), (BloomModel, BloomConfig)])
def test_transformers_own_models_that_compute_attention_themselves(model_class, config_class, tmp_path):
    config = config_class(**SIZES, num_hidden_layers=1)
    model_class(config).save_pretrained(tmp_path)
    for load in (
        lambda: model_class.from_pretrained(tmp_path, attn_implementation=ATTENTION_NAME),
        lambda: model_class(config_class(**SIZES, num_hidden_layers=1, attn_implementation=ATTENTION_NAME)),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"{model_class.__name__}: \w+Attention computes attention itself"
        ):
            load()
    model = model_class.from_pretrained(tmp_path)
    model.config._attn_implementation = ATTENTION_NAME
    with pytest.raises(NotImplementedError, match="computes attention itself"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_a_table_of_attention_classes(tmp_path):
    config = SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        window_size=2, global_attn_indexes=[0], mlp_dim=32,
    )  # fmt: skip
    SamVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"a table of its own \(SAM_VISION_ATTENTION_CLASSES\)"):
        SamVisionModel.from_pretrained(tmp_path, attn_implementation=ATTENTION_NAME)


def test_a_model_that_is_switched():
    model = BadModel(BadConfig())
    with pytest.raises(NotImplementedError, match="BadModel: WithSoftmax computes attention itself"):
        model.set_attn_implementation(ATTENTION_NAME)
    assert model.config._attn_implementation != ATTENTION_NAME
    model.set_attn_implementation("eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_no_graph_break_and_no_new_frame():
    model, other, batch = tiny_model("llama", num_hidden_layers=1), tiny_model("mistral"), batch_of("left")
    counter = CompileCounter()
    forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = model(**batch.inputs()).logits
        torch.testing.assert_close(forward(**batch.inputs()).logits, expected)
        guard.check_config(other.config)  # another class is admitted
        forward(**batch.inputs())
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_refuses_while_tracing_too():
    model = BadModel(BadConfig())
    model.config._attn_implementation = ATTENTION_NAME
    with pytest.raises(torch._dynamo.exc.Unsupported, match="WithSoftmax computes attention itself"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 5, 32))


def test_costs_little():
    """Once a forward, and nothing a layer. The least of many, since other processes add to it."""
    config = tiny_model("llama").config
    guard.check_config(config)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        guard.check_config(config)
        times.append(time.perf_counter() - start)
    assert min(times) < 50e-6, f"median {statistics.median(times) * 1e6:.1f} µs"
