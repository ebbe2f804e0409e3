"""A built wheel holds both packages and nothing else, and works where it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fa_ops", "fa_ops_meta")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")

USE = """
import sys, torch, fa_ops, fa_ops_meta
for package in (fa_ops, fa_ops_meta):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
q = torch.randn(5, 2, 16, requires_grad=True)
out = fa_ops.attention(q, q, q, torch.tensor([0, 2]), torch.tensor([2, 3]), is_causal=False)
scores = torch.einsum("qhd,khd->hqk", q[2:], q[2:]) / 4
torch.testing.assert_close(out[2:], torch.einsum("hqk,khd->qhd", scores.softmax(-1), q[2:]))
out.sum().backward()
assert q.grad.isfinite().all()
"""


def run(*command: str, **options) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # Built from a copy: setuptools writes beside its sources, and packs what it finds left over there.
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), str(source))
    (built,) = wheels.iterdir()
    return built


def test_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_wheel_states_its_requirements_and_license(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    for line in (
        "Name: fa_ops",
        "Requires-Python: >=3.11",
        "License-Expression: Apache-2.0",
        "Requires-Dist: torch>=2.11",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
        'Requires-Dist: transformers>=5.17; extra == "hf"',
    ):
        assert line in lines, line


def test_wheel_works_installed_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    run(*PIP, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel))
    env = os.environ | {"PYTHONPATH": str(target), "CUDA_VISIBLE_DEVICES": ""}
    run(sys.executable, "-c", USE, str(target), cwd=tmp_path, env=env)
