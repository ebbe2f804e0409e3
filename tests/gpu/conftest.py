"""The suite needs a CUDA device, and leaves a summary of what ran where.

The summary goes to the file that FA_OPS_GPU_SUMMARY names, or else, for a run that selects nothing by -k, to RESULTS.md
beside this file.
"""

import datetime
import importlib.metadata
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if not torch.cuda.is_available():
    raise pytest.UsageError("tests/gpu: needs a CUDA device and torch sees none; nothing of it is skipped")


class Summary:
    """Counts outcomes, wherever the tests ran, and writes them down at the end."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.outcomes: Counter[str] = Counter()
        self.accuracy_cases = 0
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)
            print(f"\nFAILED {report.nodeid}", flush=True)  # now: a time limit may come before the end
        elif report.when == "call" and report.passed:
            self.accuracy_cases += dict(report.user_properties).get("accuracy_cases", 0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = os.environ.get("FA_OPS_GPU_SUMMARY")
        if path is None and not session.config.option.keyword:
            path = HERE / "RESULTS.md"
        if path is not None and not session.config.option.collectonly:
            Path(path).write_text(self.text(session.config.invocation_params.args))

    def text(self, arguments: tuple) -> str:
        properties = torch.cuda.get_device_properties(0)
        rows = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": " ".join(["pytest", *map(str, arguments)]),
            "card": f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "CUDA": torch.version.cuda,
            "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in ("triton", "transformers")},
            "commit": os.environ.get("FA_OPS_COMMIT")
            or _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"),
            "passed": self.outcomes["passed"],
            "failed": self.outcomes["failed"],
            "skipped": self.outcomes["skipped"],
            "accuracy cases passed": self.accuracy_cases,
            "duration": f"{time.monotonic() - self.start:.0f} s",
        }
        table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        failures = "".join(f"- `{nodeid}`\n" for nodeid in self.failures)
        return f"# Last run of the GPU suite\n\n| | |\n|---|---|\n{table}" + (
            f"\nFailed:\n\n{failures}" if failures else ""
        )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        config.pluginmanager.register(Summary(), "gpu-summary")


@pytest.fixture(autouse=True, scope="session")
def _exact_matrix_products():
    """Plain torch is the yardstick: float32 without TF32, 16 bits accumulated in float32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
