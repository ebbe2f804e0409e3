"""FA_OPS_KERNEL: which kernels may run on a GPU."""

import pytest

from fa_ops.kernels.tier import TIERS, read_tier
from tests.unit.test_imports import run_fresh


def test_values():
    assert read_tier({}) == "auto"
    assert [read_tier({"FA_OPS_KERNEL": value}) for value in TIERS] == list(TIERS)


@pytest.mark.parametrize("value", ["", "Portable", "fast"])
def test_other_values_are_refused(value: str):
    with pytest.raises(ValueError, match=r"FA_OPS_KERNEL: '.*' given .*; accepted are 'auto', 'portable'"):
        read_tier({"FA_OPS_KERNEL": value})


@pytest.mark.parametrize("without", [None, "triton"])
def test_refused_at_import(without: str | None):
    code = """
import os
os.environ["FA_OPS_KERNEL"] = "fast"
try:
    import fa_ops
except ValueError as error:
    print(error)
"""
    assert "FA_OPS_KERNEL: 'fast' given" in run_fresh(code, without)
