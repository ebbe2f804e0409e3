"""A sparse model's state is plain values: what moves, empties, copies or traces the model does not change them."""

import copy
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.curves import Calibrated
from tests.sparsity.models import config_of, logits, sharp_model, tokens

KINDS = ["fixed", "calibrated"]


def sparse_model(kind: str = "fixed", **changes):
    model = mtsa.sparsify(sharp_model(**changes), config_of(backend="triton", collect_stats=True))
    if kind == "calibrated":
        for method in sparse_methods(model).values():
            method.set_calibrated({"prefill": Calibrated(40.0, 1.0, 0.5), "decode": Calibrated(30.0, 1.0, 0.5)})
    return model


def emptied_and_loaded(model):
    """As a model is loaded that was made on the meta device."""
    whole = sharp_model(num_hidden_layers=model.config.num_hidden_layers)
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    for name, buffer in whole.named_buffers():  # of the positions, which a state dict does not have
        model.get_buffer(name).copy_(buffer)
    return model


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = {
    "emptied": emptied_and_loaded,
    "meta and back": lambda model: emptied_and_loaded(model.to("meta")),
    "float64 and back": lambda model: model.double().float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16 and back": lambda model: model.half().float(),
    "copied": copy.deepcopy,
    "pickled": pickled,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_drops_the_same_whatever_is_done_to_it(kind, change):
    ids, changed = tokens(), CHANGES[change]
    model, wanted = sparse_model(kind), mtsa.sparsify(changed(sharp_model()), config_of(backend="triton"))
    for method, own in zip(*(sparse_methods(m).values() for m in (wanted, model)), strict=True):
        method.set_calibrated(own.calibrated)
    logits(model, ids)
    found = changed(model)
    with mtsa.collect_stats(found):
        assert torch.equal(logits(found, ids), logits(wanted, ids))
    assert 0 < mtsa.dropped_share(found, "prefill") < 0.95
    dense = sharp_model()
    assert [name for name, _ in found.named_modules()] == [name for name, _ in dense.named_modules()]
    assert [name for name, _ in found.named_buffers()] == [name for name, _ in dense.named_buffers()]


def test_a_copy_shares_no_tensor_and_counts_for_itself():
    model, ids = sparse_model(), tokens()
    sparse = logits(model, ids)
    counted = mtsa.block_counts(model)
    twins = [copy.deepcopy(model), pickled(model)]
    for twin in twins:
        assert mtsa.dropped_share(twin, "prefill") is None
        assert torch.equal(logits(twin, ids), sparse)
        mtsa.set_thresholds(twin, {"prefill": [1e-30]})
        assert not torch.equal(logits(twin, ids), sparse)
    assert all(torch.equal(counts, counted[name]) for name, counts in mtsa.block_counts(model).items())
    assert torch.equal(logits(model, ids), sparse)


def test_counts_stay_where_a_model_moves():
    model = sparse_model()
    logits(model, tokens())
    counted = mtsa.block_counts(model)
    model.to("meta")(tokens().to("meta"))
    assert all(torch.equal(counts, counted[name]) for name, counts in mtsa.block_counts(model).items())


def test_made_in_inference_mode_and_trained_outside():
    model, ids = sharp_model(), tokens()
    with torch.inference_mode():
        mtsa.sparsify(model, config_of(backend="triton", collect_stats=True))
        logits(model, ids)
    visited = mtsa.block_counts(model)["model.layers.0.self_attn"][0, 0]
    mtsa.set_thresholds(model, {"prefill": [0.2]})
    loss = model(ids[:, :-2], labels=ids[:, :-2]).loss
    loss.backward()
    assert torch.equal(mtsa.block_counts(model)["model.layers.0.self_attn"][0, 0], 2 * visited)
    fresh = mtsa.sparsify(sharp_model(), config_of(backend="triton", thresholds={"prefill": [0.2]}))
    assert torch.equal(loss, fresh(ids[:, :-2], labels=ids[:, :-2]).loss)


def test_fake_tensors_leave_nothing_behind():
    real = sharp_model()
    with FakeTensorMode(), torch.no_grad():
        model = mtsa.sparsify(type(real)(real.config), config_of(backend="triton", collect_stats=True))
        assert isinstance(model(torch.ones(2, 50, dtype=torch.int64)).logits, FakeTensor)
    assert mtsa.dropped_share(model, "prefill") is None


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_compiled_one_by_one_share_their_code(kind):
    """From the first call on, with tensors that no call has made yet."""
    model = emptied_and_loaded(sparse_model(kind, num_hidden_layers=6))
    expected, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        for length in (31, 50, 150):
            ids = tokens(length)
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)
    assert 1 <= counter.frame_count <= 2
    assert list(mtsa.block_counts(model)) == list(mtsa.block_counts(expected))
    assert mtsa.dropped_share(model, "prefill") == mtsa.dropped_share(expected, "prefill")
    fresh = sparse_model(kind, num_hidden_layers=6)
    assert torch.equal(logits(expected, tokens()), logits(fresh, tokens()))


@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_has_its_thresholds_and_no_counts():
    model, expected = emptied_and_loaded(sparse_model(num_hidden_layers=1)), sparse_model(num_hidden_layers=1)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (tokens(64),), strict=False)
        assert mtsa.dropped_share(model, "prefill") is None
        assert torch.equal(program.module()(tokens(64)), expected(tokens(64)).logits)
    assert not program.graph_signature.buffers_to_mutate
    assert mtsa.dropped_share(model, "prefill") is None
    assert 0 < mtsa.dropped_share(expected, "prefill") < 0.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_effect(dtype):
    calibration = {
        "target_sparse_ratio": {"prefill": 0.2, "decode": 0.5}, "max_seqlen": 256, "samples": 16, "min_tokens": 1,
        "num_decode_tokens": 6,
    }  # fmt: skip
    texts = [tokens(6000, rows=1, seed=3)[0].tolist()]

    def run(default: torch.dtype):
        fixed, calibrated = sharp_model(), sharp_model()
        torch.set_default_dtype(default)
        try:
            mtsa.sparsify(fixed, config_of(backend="triton"))
            mtsa.sparsify(calibrated, config_of(backend="triton", calibration=calibration), texts)
            return [logits(model, tokens()) for model in (fixed, calibrated)], [
                mtsa.export_sparse_attention_config(model) for model in (fixed, calibrated)
            ]
        finally:
            torch.set_default_dtype(torch.float32)

    (expected, configs), (found, found_configs) = run(torch.float32), run(dtype)
    assert found_configs == configs
    for one, want in zip(found, expected, strict=True):
        assert torch.equal(one, want)
