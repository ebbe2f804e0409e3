"""What the tests of the benchmarks share."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
MODULES = (
    "cases", "timing", "report", "peers", "comparing", "memory", "environment", "plot", "structured", "sparsity",
    "decode", "prefill", "parts", "goals", "run", "tune_portable",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules, importable only while the tests of one file run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def counting_clock(bench):
    class CountingClock(bench.timing.CpuClock):
        """Every reading is one millisecond after the one before."""

        now = 0

        def start(self):
            self.now += 1_000_000
            return self.now

        stop = start

    return CountingClock()
