"""No family of Transformers is wrong in silence, and those that the documentation calls right are right.

A tenth of the families, chosen by the hash of their names, runs in `make test`, the others in `make test-all`.
"""

import hashlib

import pytest
import torch
import transformers
from transformers import AttentionMaskInterface

from fa_ops.integrations.huggingface import ATTENTION_NAME
from tests.families import building, comparing, table

COMMITTED = table.committed()
IS_THE_PAGES_VERSION = f"Transformers {transformers.__version__}," in table.text()


def in_tenths() -> list:
    """Every family, nine in ten of them slow."""
    return [
        pytest.param(family, marks=[] if _hash(family) % 10 == 0 else [pytest.mark.slow])
        for family in building.families()
    ]


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


@pytest.mark.parametrize("family", in_tenths())
def test_family(family):
    report = comparing.examine(family)
    if IS_THE_PAGES_VERSION and COMMITTED[family] not in ("wrong", "crashed"):
        assert report.state == COMMITTED[family], report.reason
    elif report.state == "not built":
        pytest.skip(report.reason)
    assert report.state not in ("wrong", "crashed"), report.reason


@pytest.mark.skipif(not IS_THE_PAGES_VERSION, reason="the page was written with another version of Transformers")
def test_the_page_has_every_family():
    assert COMMITTED.keys() == set(building.families())


def test_the_harness_sees_lost_padding(monkeypatch):
    mapping = AttentionMaskInterface._global_mapping
    made = mapping[ATTENTION_NAME]
    monkeypatch.setitem(mapping, ATTENTION_NAME, lambda **given: made(**{**given, "attention_mask": None}))
    for family in ("llama", "bert", "bart"):
        states = {name: outcome.state for name, outcome in comparing.examine(family).outcomes.items()}
        assert states["no padding"] == "right"
        assert states["left padding"] == states["holes"] == states["gradients"] == "wrong"
        if family != "llama":  # no token of a decoder sees what lies on its right
            assert states["right padding"] == "wrong"
        if family != "bert":
            assert states["generate, static cache, left padding"] == "wrong"
            assert states["beams"] in ("wrong", "refused")


@pytest.mark.parametrize("family", ["mistral", "gemma2", "modernbert"])
def test_the_harness_sees_a_window_of_another_size(family):
    pair = comparing.Pair.of(family)
    ours = building.loaded_as_ours(pair.eager)
    scenario = pair.scenarios()["no padding"]
    assert comparing.outcome_of(scenario, pair.eager, ours).state == "right"
    pair.eager.config.sliding_window += 1
    assert comparing.outcome_of(scenario, pair.eager, ours).state == "wrong"


def test_a_model_that_pays_no_attention_is_not_called_right():
    report = comparing.examine("mamba")
    assert (report.state, report.calls) == ("not called", 0)


def test_results_depend_on_attention():
    """So that a family that is called right could have been wrong."""
    for family in ("llama", "gemma3_text", "bart", "clip"):
        report = comparing.examine(family, names=("no padding",))
        assert report.calls > 0
        assert report.effect > 1e-2


def test_rounding_is_told_from_faults():
    pair = comparing.Pair.of("llama")
    scenario = pair.scenarios()["no padding"]
    expected = scenario.run(pair.eager)
    noise = comparing.rounding_noise(scenario.run, pair.eager, expected)
    assert 0 < comparing.MARGIN * noise < comparing.ROUNDING
    assert comparing.distance(scenario.run(pair.eager), expected)[0] == 0, "the weights are as they were"
    spoilt = {name: t + 1e-3 * t.abs().max() * torch.eye(*t.shape[-2:]) for name, t in expected.items()}
    assert comparing.distance(spoilt, expected)[0] > comparing.ROUNDING


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NotImplementedError(f"position_bias is not supported by {ATTENTION_NAME}"), "refused"),
        (ValueError("fa_ops.attention: q has 3 dimensions"), "refused"),
        (KeyError(ATTENTION_NAME), "crashed"),
        (ValueError("Attention mask should be of size (2, 1, 4, 4)"), "crashed"),
    ],
)
def test_a_refusal_names_who_refuses(error, state):
    with pytest.raises(type(error)) as raised:
        raise error
    assert comparing.failure(raised.value).state == state
