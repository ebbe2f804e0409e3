import random

import pytest
import torch

pytest.register_assert_rewrite("tests.support")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # A skipped GPU suite reads like a passed one.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("needs a CUDA device and torch sees none; `make test-gpu` runs it on a machine with one", False)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """No compiled frame, guard or counter of another test: before the test, and none of it left after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
