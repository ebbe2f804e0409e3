"""Here CPU tensors must run the Triton kernels, in Triton's interpreter."""

import pytest

from fa_ops import ops

if not ops.IS_INTERPRETED:
    raise pytest.UsageError("tests/interpret: set TRITON_INTERPRET=1 in the environment; no kernel runs here without")


def pytest_configure(config: pytest.Config) -> None:
    # numpy's remarks on what masks take out again: poison, and scores where nothing is seen
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
