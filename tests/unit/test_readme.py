"""The README's examples, run as they stand."""

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def path(tmp_path):
    """A saved model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, path):
    namespace = {"path": path}
    exec(EXAMPLES[number], namespace)
    if "out" in namespace:
        assert namespace["out"].isfinite().all()
        assert namespace["q"].grad.abs().max() > 0
    else:
        assert namespace["tokens"].shape == (2, 10)
        assert all(parameter.grad is not None for parameter in namespace["model"].parameters())


def test_there_are_two():
    assert ["register_triton_attention" in example for example in EXAMPLES] == [False, True]
