"""What a figure was measured on: card, clocks, versions, commit."""

import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

NVIDIA_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


def describe(device: str) -> dict[str, str]:
    """The columns that every row of the CSV repeats; a version that is not there is an empty field."""
    smi = nvidia_smi() if device == "cuda" else {}
    clocks = (f"{field.removeprefix('clocks.')} {smi[field]}" for field in NVIDIA_SMI_FIELDS[1:] if field in smi)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "device": device,
        "card": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "clocks": "; ".join(clocks),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if device == "cuda" else "",
        "driver": smi.get("driver_version", ""),
    }


def device_kind(device: str) -> str:
    """The name of the result files: `cpu`, or the card's name such as `nvidia-h200`."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def nvidia_smi() -> dict[str, str]:
    """The card's state by field, as nvidia-smi prints it; empty where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return {"clocks.sm": f"nvidia-smi failed: {result.stdout.strip() or result.stderr.strip()}"}
    return dict(zip(NVIDIA_SMI_FIELDS, result.stdout.strip().split(", "), strict=True))


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """FA_OPS_COMMIT where it is set (a copy of the tree without its history), else what git says."""
    if "FA_OPS_COMMIT" in os.environ:
        return os.environ["FA_OPS_COMMIT"]
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""
