"""Sparse models: what they compute, what they count, and what is left when sparsity goes."""

import copy

import pytest
import torch

import fa_ops.sparsity as mtsa
from fa_ops.reference import skip_softmax_blocks
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.counting import count_dropped
from fa_ops_meta.skip import VISIT_ORDERS
from tests.models.tiny import cache_of
from tests.sparsity.models import config_of, logits, sharp_model, tokens

FAMILIES = ["llama", "mistral", "gpt_oss"]


def assert_some_dropped(model, phase="prefill"):
    assert 0 < mtsa.dropped_share(model, phase) < 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_differs_from_dense_and_removing_gives_the_model_back(family):
    model, ids = sharp_model(family), tokens()
    dense, keys = logits(model, ids), model.state_dict().keys()
    mtsa.sparsify(model, config_of(collect_stats=True))
    assert model.config._attn_implementation == "modelopt_triton"
    assert model.state_dict().keys() == keys
    sparse = logits(model, ids)
    assert_some_dropped(model)
    assert (sparse - dense).abs().max() > 1e-3

    assert mtsa.remove_sparse_attention(model) is model
    assert not mtsa.is_attn_sparsified(model)
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model.config, "sparse_attention_config")
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert torch.equal(logits(model, ids), dense)


def test_backends_drop_the_same_blocks_and_have_the_same_gradients():
    losses, counts, gradients = [], [], []
    for backend in ("pytorch", "triton"):
        model, ids = mtsa.sparsify(sharp_model(), config_of(backend=backend, collect_stats=True)), tokens()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert_some_dropped(model)
        losses.append(loss)
        counts.append(torch.stack(list(mtsa.block_counts(model).values())))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(*counts)
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dense_phases_and_disabled_modules_are_the_op():
    model, ids = sharp_model(attention="modelopt_triton"), tokens()
    dense = logits(model, ids)
    mtsa.sparsify(model, config_of(collect_stats=True))
    sparse = logits(model, ids)
    assert_some_dropped(model)
    mtsa.disable_sparse_attention(model)
    assert torch.equal(logits(model, ids), dense)
    mtsa.enable_sparse_attention(model, "*0*")
    part = logits(model, ids)
    assert not torch.equal(part, dense)
    assert not torch.equal(part, sparse)
    mtsa.enable_sparse_attention(model, lambda name: name.endswith("1.self_attn"))
    assert torch.equal(logits(model, ids), sparse)
    with pytest.raises(ValueError, match="'cross' matches none of the sparse modules"):
        mtsa.enable_sparse_attention(model, "cross")


def test_left_padding_does_not_change_a_row():
    model, ids = mtsa.sparsify(sharp_model(), config_of(collect_stats=True)), tokens(rows=1)
    padded = torch.nn.functional.pad(ids, (7, 0))
    mask = (torch.arange(padded.shape[1]) >= 7).long()[None]
    with torch.no_grad():
        alone = model(ids).logits
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 7:]
    assert_some_dropped(model)
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


def test_counts_of_a_prefill_and_of_decoding_over_both_caches():
    counts = []
    for kind in ("dynamic", "static"):
        model, ids = mtsa.sparsify(sharp_model(), config_of(collect_stats=True)), tokens(rows=1)
        cache = cache_of(kind, model, length=200)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        counts.append(torch.stack(list(mtsa.block_counts(model).values())))
        assert_some_dropped(model)
        assert_some_dropped(model, "decode")
    assert torch.equal(*counts)
    blocks = -(-ids.shape[1] // 16)
    assert (counts[0][:, 0, 0] == blocks * (blocks + 1) // 2).all()
    assert (counts[0][:, 1, 0] == -(-(ids.shape[1] + 1) // 16)).all()


def test_collect_stats_is_a_context():
    model = mtsa.sparsify(sharp_model(), config_of())
    logits(model, tokens())
    assert mtsa.dropped_share(model, "prefill") is None
    with mtsa.collect_stats(model):
        logits(model, tokens())
    before = mtsa.block_counts(model)
    logits(model, tokens())
    assert all(torch.equal(counts, before[name]) for name, counts in mtsa.block_counts(model).items())
    assert_some_dropped(model)


def test_summary_says_what_was_measured():
    model = mtsa.sparsify(sharp_model(), config_of(collect_stats=True))
    assert "prefill: not measured" in mtsa.summary(model)
    logits(model, tokens())
    assert "of 880 blocks dropped" in mtsa.summary(model)
    mtsa.set_thresholds(model, {"prefill": [1e-30]})
    for method in sparse_methods(model).values():
        method.reset_counts()
    logits(model, tokens())
    assert "prefill: 0 % dropped: this model runs dense" in mtsa.summary(model)


def test_another_implementation_raises_rather_than_run_dense():
    model = mtsa.sparsify(sharp_model(), config_of())
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="LlamaAttention: the attention implementation was changed to 'sdpa'"):
        logits(model, tokens())
    assert "DENSE: its attention implementation is 'sdpa'" in mtsa.summary(model)


def test_thresholds_of_heads_and_of_modules():
    model, ids = mtsa.sparsify(sharp_model(), config_of(collect_stats=True)), tokens()
    mtsa.set_thresholds(model, {"prefill": [0.9, 1e-30, 1e-30, 1e-30]}, "*0*")
    logits(model, ids)
    first, second = (counts[0, 1] for counts in mtsa.block_counts(model).values())
    assert first[0] > 0
    assert (first[1:] == 0).all()
    assert second.sum() > 0


def test_a_copy_is_a_model_of_its_own():
    model, ids = sharp_model(), tokens()
    dense = logits(model, ids)
    mtsa.sparsify(model, config_of())
    sparse, twin = logits(model, ids), copy.deepcopy(model)
    mtsa.remove_sparse_attention(twin)
    assert torch.equal(logits(twin, ids), dense)
    assert torch.equal(logits(model, ids), sparse)


def test_a_sparse_context_ends_with_its_exception():
    model = sharp_model(attention="modelopt_triton")
    other = mtsa.sparsify(sharp_model(), config_of()).model.layers[0].self_attn.sparse_attention
    module = model.model.layers[0].self_attn

    def fail():
        with other.get_sparse_context(module):
            assert module.sparse_attention is other
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not hasattr(module, "sparse_attention")


@pytest.mark.parametrize("order", VISIT_ORDERS)
@pytest.mark.parametrize(
    ("len_q", "len_k", "block", "options"),
    [
        (130, 130, (16, 16), {}),
        (50, 130, (16, 32), {"softcap": 8.0}),
        (130, 90, (32, 16), {"window_size": (40, 0)}),
        (90, 90, (16, 16), {"is_causal": False}),
        (1, 4500, (64, 128), {}),
    ],
)
def test_counting_agrees_with_the_reference(len_q, len_k, block, options, order, monkeypatch):
    monkeypatch.setattr("fa_ops.cpu_skip.PLAIN_BLOCK_ELEMENTS", 1 << 12)
    q, k = torch.randn(2, len_q, 4, 16) * 3, torch.randn(2, len_k, 2, 16)
    ranges = {
        "b_start_loc": torch.tensor([0, 0]),
        "b_seq_len": torch.tensor([len_q, max(len_q - 20, 1)]),
        "b_start_loc_k": torch.tensor([3, 0]),
        "b_seq_len_k": torch.tensor([len_k - 3, len_k - 20]),
    }
    key_mask = torch.rand(2, len_k) < 0.9
    trials = (0.01, 0.1, 0.5)
    counts = count_dropped(q, k, trials, block, **ranges, key_mask=key_mask, order=order, **options)
    visited, dropped = counts.by_sequence()
    for number, trial in enumerate(trials):
        blocks = skip_softmax_blocks(
            q, k, **ranges, key_mask=key_mask, order=order, skip_softmax_threshold=trial, skip_softmax_block=block,
            **options,
        )  # fmt: skip
        assert visited.tolist() == [b.visited.sum((1, 2)).tolist() for b in blocks]
        assert dropped[number].tolist() == [b.dropped.sum((1, 2)).tolist() for b in blocks]
    assert 0 < dropped[-1].sum() < visited.sum()
