"""What importing the packages costs, touches and needs. Every case runs in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One causal attention over two sequences on the CPU, against torch's own.
ATTEND = """
import torch, fa_ops
q = torch.randn(5, 2, 16)
out = fa_ops.attention(q, q, q, torch.tensor([0, 2]), torch.tensor([2, 3]))
sdpa = torch.nn.functional.scaled_dot_product_attention
for rows in (q[:2], q[2:]):
    heads = rows.transpose(0, 1)
    expected = sdpa(heads, heads, heads, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(out[: len(rows)], expected)
    out = out[len(rows) :]
"""

NEW_MODULES = """
import json, sys, torch
before = set(sys.modules)
import {package}
print(json.dumps(sorted(set(sys.modules) - before)))
"""

# CPU time, since the tests beside this one would stretch the clock's.
SECONDS = """
import time, torch
start = time.process_time()
import fa_ops
print(time.process_time() - start)
"""


def start_fresh(code: str, without: str | None = None) -> subprocess.CompletedProcess:
    """Runs `code` in a new process that sees no GPU and, where named, not the module `without`."""
    hidden = f"import sys; sys.modules[{without!r}] = None\n" if without else ""
    # fa_ops may be compiled to bytecode once, as that of an installation is, and not at each import
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run([sys.executable, "-c", hidden + code], env=env, capture_output=True, text=True, timeout=120)


def run_fresh(code: str, without: str | None = None) -> str:
    """The output of `code`, which must not fail."""
    run = start_fresh(code, without)
    assert run.returncode == 0, run.stderr
    return run.stdout


def new_modules(package: str) -> set[str]:
    """The modules that importing `package` adds to those of torch, the standard library's left out."""
    modules = json.loads(run_fresh(NEW_MODULES.format(package=package)))
    return {m for m in modules if m.partition(".")[0] not in sys.stdlib_module_names and "_sysconfigdata" not in m}


def test_works_without_a_gpu():
    run_fresh(ATTEND + "assert fa_ops.IS_AVAILABLE is False")


def test_works_without_triton_on_the_cpu():
    run_fresh(ATTEND + "assert fa_ops.IS_AVAILABLE is False", without="triton")


def test_without_triton_a_cuda_tensor_is_told_what_to_install():
    # The op's body, since dispatch would hand fake tensors to its fake, which needs no Triton.
    code = """
import torch, fa_ops.ops
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    q = torch.empty(5, 2, 16, device="cuda")
    index = torch.empty(1, dtype=torch.int64, device="cuda")
    try:
        fa_ops.ops._varlen_attention(q, q, q, index, index)
    except ImportError as error:
        print(error)
"""
    message = run_fresh(code, without="triton")
    assert "pip install triton" in message, message


def test_works_without_transformers():
    run_fresh(ATTEND, without="transformers")


def test_without_transformers_registering_says_what_to_install():
    code = """
import fa_ops
try:
    fa_ops.register_triton_attention()
except ImportError as error:
    print(error)
"""
    message = run_fresh(code, without="transformers")
    assert "transformers" in message, message
    assert "pip install" in message, message


def test_fa_ops_meta_imports_torch_only():
    packages = {m.partition(".")[0] for m in new_modules("fa_ops_meta")}
    assert packages <= {"fa_ops_meta", "torch"}, packages


def test_fa_ops_imports_no_compiler_and_no_transformers():
    modules = new_modules("fa_ops")
    assert {m.partition(".")[0] for m in modules} <= {"fa_ops", "fa_ops_meta", "torch", "triton"}
    assert not [m for m in modules if m.startswith(("torch._dynamo", "torch._inductor"))]


@pytest.mark.parametrize("without", [None, "triton", "transformers"])
def test_import_is_silent(without):
    run = start_fresh("import fa_ops", without)
    assert run.stdout + run.stderr == ""


def test_import_touches_no_driver():
    run_fresh("""
import torch
def refuse(*args, **kwargs):
    raise AssertionError("importing fa_ops asked for the device")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
torch.cuda.current_device = torch.cuda.get_device_capability = torch.cuda.get_device_properties = refuse
import fa_ops
assert not torch.cuda.is_initialized()
""")


def test_import_takes_at_most_300_ms_beyond_torch():
    """The least of five, since what runs beside them can only add to CPU time."""
    seconds = [float(run_fresh(SECONDS)) for _ in range(5)]
    assert min(seconds) <= 0.3, seconds


@pytest.mark.parametrize("code", ["raise SystemExit(1)", "import triton"])
def test_a_failure_in_the_fresh_process_is_seen(code):
    with pytest.raises(AssertionError):
        run_fresh(code, without="triton")
