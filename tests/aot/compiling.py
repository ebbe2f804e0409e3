"""Compiles the kernels ahead of time, as the launcher would specialise them, and reads what came out. No GPU needed."""

import contextlib
import io
import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fa_ops.kernels.backward import attention_backward_dkv_kernel, attention_backward_dq_kernel
from fa_ops.kernels.configs import Tile, block_dim
from fa_ops.kernels.counting import count_kept_kernel
from fa_ops.kernels.decode import attention_combine_kernel, attention_decode_kernel
from fa_ops.kernels.forward import attention_forward_kernel
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS

if triton.knobs.runtime.interpret:
    raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; run these tests without it")

KERNELS = {
    "forward": attention_forward_kernel,
    "decode": attention_decode_kernel,
    "combine": attention_combine_kernel,
    "dq": attention_backward_dq_kernel,
    "dkv": attention_backward_dkv_kernel,
    "counting": count_kept_kernel,
}
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
INDEX_TENSORS = {"block_bits_ptr": "*i32", "kept_ptr": "*i32", "counts_ptr": "*i64", "key_mask_ptr": "*i1"}
FLOAT32_TENSORS = {"threshold_ptr", "trials_ptr", "part_out_ptr", "part_lse_ptr", "lse_ptr", "dlse_ptr", "delta_ptr"}


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
    if name in INDEX_TENSORS:
        return INDEX_TENSORS[name]
    if name.startswith(("b_", "block_table")):
        return "*i32"
    return f"*{dtype}"


def compile_kernel(
    kernel: str, arch: str, tile: Tile, dtype: str, head_dim: int, *, group_size: int = 4, **flags: bool
) -> Report:
    """Compiles `kernel` for pointers and strides that are multiples of 16, as usual, as far as it asks."""
    fn = KERNELS[kernel]
    constants = {
        "GROUP_SIZE": group_size, "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim,
        "BLOCK_D": block_dim(head_dim), "BLOCK_DV": block_dim(head_dim),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_TRIALS": 32,
        "HAS_LEFT": False, "HAS_RIGHT": True, "HAS_SOFTCAP": False, "HAS_SINKS": False,
        "IS_PACKED": True, "HAS_KEY_MASK": False, "HAS_DLSE": False, "SKIP_SOFTMAX": False,
        "PAGING": 0, "SKIP_BLOCK_Q": 0, "SKIP_BLOCK_K": 0, "VISIT_ORDER": VISIT_ORDERS.index(VISIT_ORDER),
        "LEAVES_SINGLE_ROWS": False, "HOLES_ONLY": False, **flags,
    }  # fmt: skip
    signature, attrs = {}, {}
    for index, (name, parameter) in enumerate(zip(fn.arg_names, fn.params, strict=True)):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _pointer_type(name, dtype)
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif name in ("softmax_scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize:
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, {k: v for k, v in constants.items() if k in signature}, attrs)
    return compile_source(source, arch, num_warps=tile.num_warps, num_stages=tile.num_stages)


def compile_source(source: ASTSource, arch: str, **options: int) -> Report:
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # what comes from the cache leaves no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY[arch], 32), options=options)
    registers, spilled, warnings = _parse_ptxas_log(log.getvalue())
    return Report(compiled.metadata.shared, registers, spilled, warnings, compiled.asm["ptx"])


def _parse_ptxas_log(log: str) -> tuple[int, int, tuple[str, ...]]:
    registers = re.findall(r"Used (\d+) registers", log)
    assert len(registers) == 1, f"ptxas should report the registers of one function: {log}"
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    warnings = tuple(sorted(set(re.findall(r"C75\d\d", log))))
    return int(registers[0]), sum(map(int, spills)), warnings
