"""register_triton_attention(): what it registers, how often, and where it works."""

import subprocess
import sys
import warnings

import pytest
from transformers import AttentionInterface, AttentionMaskInterface

import fa_ops
from fa_ops.integrations.huggingface import ATTENTION_NAME, triton_attention_forward, triton_attention_mask

WITHOUT_TRITON_AND_GPU = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules["triton"] = None
import fa_ops, torch
assert "transformers" not in sys.modules
assert fa_ops.register_triton_attention() is True
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="modelopt_triton"))
assert model(torch.ones(2, 5, dtype=torch.long)).logits.isfinite().all()
"""


def test_registers_the_attention_and_its_mask():
    assert fa_ops.register_triton_attention() is True
    assert AttentionInterface()[ATTENTION_NAME] is triton_attention_forward
    assert AttentionMaskInterface()[ATTENTION_NAME] is triton_attention_mask


def test_twice_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fa_ops.register_triton_attention() is True


@pytest.mark.parametrize("interface", [AttentionInterface, AttentionMaskInterface])
def test_somebody_elses_function_under_the_name_is_replaced_with_a_warning(interface, monkeypatch):
    def of_somebody_else():
        pass

    ours = interface()[ATTENTION_NAME]
    monkeypatch.setitem(interface._global_mapping, ATTENTION_NAME, of_somebody_else)
    with pytest.warns(UserWarning, match=rf"{interface.__name__}.*of_somebody_else; now it is .*{ours.__name__}"):
        fa_ops.register_triton_attention()
    assert interface()[ATTENTION_NAME] is ours


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "transformers>=5\.17"'):
        fa_ops.register_triton_attention()


def test_without_triton_and_without_a_gpu():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON_AND_GPU], check=True, timeout=120)
