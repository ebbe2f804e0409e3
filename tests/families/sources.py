"""Transformers' own tiny configurations and inputs, from the testers in a checkout of its source distribution."""

import importlib
import inspect
import sys
import types
import unittest
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto

from tests.families.building import NotBuiltError, first_line
from tests.families.inputs import LENGTH, ROWS, Arguments
from tests.families.shrinking import HEAD_DIM, without_dropout

PACKAGE = "transformers_tests"  # its own name, `tests`, is ours, too
MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask", "head_mask")  # scenarios have their own


def testers(source: Path, family: str) -> list[type[unittest.TestCase]]:
    """The test cases of a family's folder that know a tester of models."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(source / "tests")]
        sys.modules[PACKAGE] = package
    folder = configuration_auto.model_type_to_module_name(family)
    try:
        module = importlib.import_module(f"{PACKAGE}.models.{folder}.test_modeling_{folder}")
    except Exception as error:
        raise NotBuiltError(f"no tester of Transformers: {first_line(error)}") from error
    cases = [case for _, case in inspect.getmembers(module, inspect.isclass) if issubclass(case, unittest.TestCase)]
    return [case for case in cases if hasattr(case, "all_model_classes")]


def prepared(source: Path, family: str, seed: int) -> tuple[PreTrainedConfig, Arguments]:
    """Configuration and arguments, with heads of a size that the op takes and without masks."""
    reason = f"no tester of Transformers has the model type {family}"
    for case in testers(source, family):
        try:
            test = case("setUp")
            test.setUp()
            _adapt(test.model_tester)
            torch.manual_seed(seed)
            config, inputs = test.model_tester.prepare_config_and_inputs_for_common()
        except Exception as error:
            reason = first_line(error)
            continue
        if config.model_type == family:
            without_dropout(config)
            return config, {name: value for name, value in inputs.items() if name not in MASKS and _is_known(value)}
    raise NotBuiltError(reason)


def _adapt(tester: object) -> None:
    """Few rows, enough tokens for windows, and heads of at least HEAD_DIM."""
    given = vars(tester)
    given["batch_size"] = ROWS
    if "seq_length" in given:
        given["seq_length"] = LENGTH
    width, heads = given.get("hidden_size"), given.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 1 and width // heads < HEAD_DIM:
        given["num_attention_heads"] = heads = max(1, width // HEAD_DIM)
        given["num_key_value_heads"] = min(heads, given.get("num_key_value_heads") or heads)
    if isinstance(given.get("head_dim"), int):
        given["head_dim"] = max(HEAD_DIM, given["head_dim"])


def _is_known(value: object) -> bool:
    return isinstance(value, Tensor | int | float | bool)
