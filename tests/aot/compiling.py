"""Compiles the kernels ahead of time, as the launcher would specialise them, and reads what came out. No GPU needed."""

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fa_ops.kernels.backward import attention_backward_dkv_kernel, attention_backward_dq_kernel
from fa_ops.kernels.configs import Tile, block_dim
from fa_ops.kernels.forward import attention_forward_kernel

KERNELS = {
    "forward": attention_forward_kernel,
    "dq": attention_backward_dq_kernel,
    "dkv": attention_backward_dkv_kernel,
}
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
FLOAT32_TENSORS = {"lse_ptr", "dlse_ptr", "delta_ptr"}


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel: bytes of shared memory, registers of a thread, bytes spilled; and its PTX."""

    shared: int
    registers: int
    spilled: int
    warnings: tuple[str, ...]
    ptx: str


def _pointer_type(name: str, dtype: str) -> str:
    if name in FLOAT32_TENSORS:
        return "*fp32"
    if name.startswith("b_"):
        return "*i32"
    return "*i1" if name == "key_mask_ptr" else f"*{dtype}"


def compile_kernel(
    kernel: str, arch: str, tile: Tile, dtype: str, head_dim: int, *, group_size: int = 4, **flags: bool
) -> Report:
    """Compiles `kernel` for strides and pointers that are multiples of 16, as those of ordinary tensors are."""
    fn = KERNELS[kernel]
    constants = {
        "GROUP_SIZE": group_size, "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim,
        "BLOCK_D": block_dim(head_dim), "BLOCK_DV": block_dim(head_dim),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "IS_CAUSAL": True, "IS_PACKED": True, "HAS_KEY_MASK": False, "HAS_DLSE": False, **flags,
    }  # fmt: skip
    signature, attrs = {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _pointer_type(name, dtype)
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif name == "softmax_scale":
            signature[name] = "fp32"
        elif name in ("stride_ms", "stride_dlt"):
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
            if name.startswith("stride"):
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, {k: v for k, v in constants.items() if k in signature}, attrs)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", CAPABILITY[arch], 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    registers, spilled, warnings = _assemble(compiled.asm["ptx"], arch)
    return Report(compiled.metadata.shared, registers, spilled, warnings, compiled.asm["ptx"])


@functools.cache
def _ptxas(arch: str) -> str:
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    newer = os.path.join(folder, "ptxas-blackwell")
    return newer if CAPABILITY[arch] >= 100 and os.path.exists(newer) else os.path.join(folder, "ptxas")


def _assemble(ptx: str, arch: str) -> tuple[int, int, tuple[str, ...]]:
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None, "the PTX names no target"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        result = subprocess.run(
            [_ptxas(arch), "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    registers = re.search(r"Used (\d+) registers", result.stderr)
    assert registers is not None, f"ptxas printed no register count: {result.stderr}"
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)
    warnings = tuple(sorted(set(re.findall(r"C75\d\d", result.stderr))))
    return int(registers[1]), sum(map(int, spills)), warnings
