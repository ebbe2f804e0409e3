"""The README's examples, run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fa_ops.sparsity as mtsa
from tests.sparsity.models import logits, sharp_model, tokens

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def path(tmp_path):
    """A saved model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(2))
def test_example(number, path):
    namespace = {"path": path}
    exec(EXAMPLES[number], namespace)
    if "out" in namespace:
        assert namespace["out"].isfinite().all()
        assert namespace["q"].grad.abs().max() > 0
    else:
        assert namespace["tokens"].shape == (2, 10)
        assert all(parameter.grad is not None for parameter in namespace["model"].parameters())


def test_sparse_example(tmp_path, capsys):
    sharp_model().save_pretrained(tmp_path / "dense")
    texts, ids = tokens(6000, rows=1, seed=3), tokens()
    namespace = {"path": tmp_path / "dense", "folder": tmp_path / "sparse", "texts": texts, "ids": ids}
    exec(EXAMPLES[2], namespace)
    assert re.search(r"^prefill: [\d.]+% of 880 blocks dropped, 20.0% wanted$", capsys.readouterr().out, re.MULTILINE)
    model, restored = namespace["model"], namespace["restored"]
    assert not mtsa.is_attn_sparsified(model)
    assert model.config._attn_implementation == "sdpa"
    with mtsa.collect_stats(restored):
        sparse = logits(restored, ids)
    assert 0 < mtsa.dropped_share(restored, "prefill") < 0.2, "its target was changed to 0.1"
    assert not torch.equal(sparse, logits(model, ids))


def test_there_are_three():
    assert ["register_triton_attention" in example for example in EXAMPLES] == [False, True, False]
    assert "mtsa.sparsify" in EXAMPLES[2]
