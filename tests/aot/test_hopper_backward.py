"""The backward kernels for sm_90, compiled in every configuration that is shipped; see test_hopper.py."""

import pytest
import torch
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import mangle_type

from fa_ops import hopper, hopper_backward
from fa_ops.kernels.backward_tiles import backward_tiles_kernel, row_terms_kernel
from fa_ops.kernels.configs import HOPPER_BACKWARD_TILES, HopperTile
from fa_ops.kernels.hopper import ROWS
from fa_ops.kernels.hopper_backward import hopper_dkv_kernel, hopper_dq_kernel
from tests.aot.compiling import Report, compile_source
from tests.aot.test_hopper import REGISTER_FILE, WARP_GROUP, find_faults

KERNELS = {"dq": hopper_dq_kernel, "dkv": hopper_dkv_kernel}


def shipped_tile(kernel: str, head_dim: int) -> HopperTile:
    return HOPPER_BACKWARD_TILES[head_dim][list(KERNELS).index(kernel)]


def compile_backward(
    kernel: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, tile: HopperTile | None = None, is_causal=True
) -> Report:
    """As the launcher would specialise it for a contiguous packed batch."""
    tile = tile or shipped_tile(kernel, head_dim)
    fn, block = KERNELS[kernel], tile.block_n
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_N" if kernel == "dq" else "BLOCK_M": block, "STAGES": tile.stages,
        "CONSUMERS": tile.consumers, "CONSUMER_REGISTERS": tile.consumer_registers,
        "PRODUCER_REGISTERS": tile.producer_registers, "HAS_RIGHT": is_causal,
    }  # fmt: skip
    tensor = torch.empty((4, 2, head_dim), dtype=dtype)
    block_q, block_k = (ROWS.value, block) if kernel == "dq" else (block, ROWS.value)
    types = {
        **{f"{name}_desc": hopper.ragged_descriptor(tensor, block_q) for name in ("q", "dout", "dq")},
        **{f"{name}_desc": hopper.ragged_descriptor(tensor, block_k) for name in ("k", "v")},
        **{f"{name}_desc": hopper.ragged_descriptor(tensor, ROWS.value) for name in ("dk", "dv")},
        "terms_desc": hopper_backward.terms_descriptor((4, 256), block)(torch.empty((4, 256))),
        "terms_ptr": tensor.float(), "tiles_ptr": tensor.int(), "softmax_scale": 1.5,
    }  # fmt: skip
    signature, attrs = {}, {}
    for index, name in enumerate(fn.arg_names):
        signature[name] = "constexpr" if name in constants else mangle_type(types.get(name, 3), True)
        if name.endswith("_ptr"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return compile_source(GluonASTSource(fn, signature, constants, attrs), "sm_90", num_warps=4)


def check(*configuration, **flags) -> None:
    report = compile_backward(*configuration, **flags)
    faults = find_faults(report)
    assert not faults, (
        f"{'; '.join(faults)} (shared memory {report.shared} bytes, {report.registers} registers, "
        f"{report.spilled} bytes spilled, ptxas warnings {report.warnings})"
    )


@pytest.mark.parametrize("head_dim", HOPPER_BACKWARD_TILES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_causal(kernel: str, head_dim: int):
    check(kernel, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HOPPER_BACKWARD_TILES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_full(kernel: str, head_dim: int, dtype: torch.dtype):
    check(kernel, head_dim, dtype, is_causal=False)
    if dtype == torch.float16:
        check(kernel, head_dim, dtype)


def test_head_dims():
    assert set(HOPPER_BACKWARD_TILES) == set(hopper_backward.HEAD_DIMS)


@pytest.mark.parametrize("head_dim", HOPPER_BACKWARD_TILES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_are_there_for_all_roles(kernel: str, head_dim: int):
    tile = shipped_tile(kernel, head_dim)
    assert tile.stages >= (2 if kernel == "dq" else 1)
    at_entry = REGISTER_FILE // WARP_GROUP // (tile.consumers + 1) // 8 * 8
    assert tile.consumers * tile.consumer_registers + tile.producer_registers <= at_entry * (tile.consumers + 1)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kernel", [backward_tiles_kernel, row_terms_kernel], ids=lambda fn: fn.fn.__name__)
def test_preparations(kernel, is_packed: bool):
    constants = {
        "TILE": 128, "BLOCK": 64, "TERMS_BLOCK": 64, "OF_KEYS": True, "HAS_RIGHT": True, "IS_PACKED": is_packed,
        "HEAD_DIM": 128, "HAS_DLSE": True, "HAS_DELTA": True, "HAS_KEY_MASK": not is_packed,
    }  # fmt: skip
    types = {"tiles_ptr": "*i32", "key_mask_ptr": "*i1"} | dict.fromkeys(
        ("out_ptr", "dout_ptr", "grad_ptr", "dv_ptr"), "*bf16"
    )
    signature = {
        name: "constexpr" if name in constants
        else types.get(name, "*i32" if name.startswith("b_") else "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }  # fmt: skip
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(kernel.params)
        if signature[parameter.name] != "constexpr" and not parameter.do_not_specialize
    }
    constants = {name: value for name, value in constants.items() if name in signature}
    assert compile_source(ASTSource(kernel, signature, constants, attrs), "sm_90", num_warps=4).spilled == 0
