"""What is wrapped around a model, or around its layers, changes no name and hides no state."""

import json

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import sparse_methods
from tests.sparsity.models import config_of, logits, sharp_model, tokens

NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


class Plain(nn.Module):
    """Somebody's own module around a model, with a call of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids).logits.sum()


class Adapter(nn.Module):
    """A linear layer with low-rank weights beside its own, as PEFT replaces it; the added part is 0 at first."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Adapted(nn.Module):
    """PEFT's two modules around a model: what was `model.layers` is `base_model.model.model.layers`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for layer in model.model.layers:
            layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name):  # PEFT passes on what it does not have
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


def with_compiled_layers(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def with_checkpoints(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


WRAPPERS = {
    "plain": Plain,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "adapted": Adapted,
    "adapted and compiled": lambda model: torch.compile(Adapted(model), backend="eager"),
    "compiled layers": with_compiled_layers,
    "checkpoints": with_checkpoints,
    "checkpoints, plain": lambda model: Plain(with_checkpoints(model)),
}


@pytest.fixture(autouse=True)
def _without_compiling():
    """Names are what matters here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("is_wrapped_first", [False, True], ids=["sparse first", "wrapped first"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_and_the_model_in_it_are_one_model(wrapper, is_wrapped_first):
    wrap, model, ids = WRAPPERS[wrapper], sharp_model(), tokens()
    dense = logits(model, ids)
    config = config_of("model.layers.*", backend="triton")
    expected = mtsa.sparsify(sharp_model(), config)
    if is_wrapped_first:
        wrapped = wrap(model)
        assert mtsa.sparsify(wrapped, config) is wrapped
    else:
        wrapped = wrap(mtsa.sparsify(model, config))
    for one in (wrapped, model):
        assert mtsa.is_attn_sparsified(one)
        assert list(mtsa.block_counts(one)) == list(sparse_methods(one)) == NAMES
    for changed in (wrapped, expected):
        mtsa.set_thresholds(changed, {"prefill": [0.5]}, "model.layers.0.*")
        mtsa.disable_sparse_attention(changed, "model.layers.1.*")
    exported = mtsa.export_sparse_attention_config(expected)
    assert mtsa.export_sparse_attention_config(wrapped) == mtsa.export_sparse_attention_config(model) == exported
    assert model.config.sparse_attention_config == exported
    with mtsa.collect_stats(wrapped):
        sparse = logits(model, ids)
    assert torch.equal(sparse, logits(expected, ids))
    assert mtsa.dropped_share(wrapped, "prefill") > 0
    assert mtsa.summary(wrapped) == mtsa.summary(model)
    assert NAMES[0] in mtsa.summary(model)

    for restored in (lambda loaded: loaded, wrap):
        loaded = sharp_model()
        loaded.config.sparse_attention_config = json.loads(json.dumps(exported))
        with pytest.warns(UserWarning, match="disabled, so dense, are model.layers.1.self_attn"):
            mtsa.restore_sparse_attention(restored(loaded))
        assert torch.equal(logits(loaded, ids), sparse)

    assert mtsa.remove_sparse_attention(model if is_wrapped_first else wrapped) is not None
    for one in (wrapped, model):
        assert not mtsa.is_attn_sparsified(one)
    assert not any(hasattr(module, "sparse_attention") for module in model.modules() if module is not wrapped)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model.config, "sparse_attention_config")
    assert torch.equal(logits(model, ids), dense)


def test_a_model_saved_from_within_a_wrapper(tmp_path):
    model, ids = sharp_model(), tokens()
    mtsa.sparsify(Plain(model), config_of(backend="triton"))
    sparse = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    mtsa.restore_sparse_attention(Plain(loaded))
    assert torch.equal(logits(loaded, ids), sparse)


def test_texts_run_the_model_itself_and_a_function_gets_what_was_given():
    calibration = {"target_sparse_ratio": {"prefill": 0.2}, "max_seqlen": 256, "samples": 8, "min_tokens": 1}
    config, texts = config_of(backend="triton", calibration=calibration), [tokens(3000, rows=1)[0]]
    wrapped, expected = Plain(sharp_model()), mtsa.sparsify(sharp_model(), config, texts)
    mtsa.sparsify(wrapped, config, texts)
    assert mtsa.export_sparse_attention_config(wrapped) == mtsa.export_sparse_attention_config(expected)
    given = []

    def loop(model):
        given.append(model)
        model(texts[0][None, :512])

    mtsa.calibrate(wrapped, calibration, loop)
    assert given == [wrapped]


def test_gradients_of_checkpointed_layers_are_those_of_the_sparse_model():
    gradients = []
    for wrap in (lambda model: model, with_checkpoints):
        model = wrap(sharp_model())
        mtsa.sparsify(Plain(model), config_of("model.layers.*", backend="triton", collect_stats=True))
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        assert 0 < mtsa.dropped_share(model, "prefill") < 0.95
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_refuses_a_module_around_two_models():
    both = nn.ModuleDict({"teacher": sharp_model(), "student": sharp_model()})
    for function in (lambda m: mtsa.sparsify(m, config_of()), mtsa.is_attn_sparsified, mtsa.restore_sparse_attention):
        with pytest.raises(ValueError, match="ModuleDict: 2 models given, teacher and student; accepted is one"):
            function(both)
    assert mtsa.is_attn_sparsified(mtsa.sparsify(both["student"], config_of()))
    assert not mtsa.is_attn_sparsified(both["teacher"])


def test_refuses_a_model_that_is_sparse_as_part_of_another():
    model = sharp_model()
    for first, second in ((model, model.model), (model.model, model)):
        mtsa.sparsify(first, config_of())
        with pytest.raises(ValueError, match=r"0.self_attn \(LlamaAttention\): it is sparse already, and Llama"):
            mtsa.sparsify(second, config_of())
        mtsa.remove_sparse_attention(first)
    assert not any(module._forward_pre_hooks for module in model.modules())
