"""The forward kernel for sm_90, compiled in every configuration that is shipped: it spills nothing, ptxas warns of
nothing, it fits into shared memory, and copies and matrix products are the asynchronous ones."""

import itertools
import re

import pytest
import torch
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import mangle_type

from fa_ops import hopper
from fa_ops.kernels.configs import HOPPER_SPARSE_TILES, HOPPER_TILES, SHARED_MEMORY, HopperSparseTile, HopperTile
from fa_ops.kernels.hopper import ROWS, hopper_forward_kernel
from fa_ops.kernels.hopper_sparse import CONSUMERS, hopper_sparse_forward_kernel
from fa_ops.kernels.tiles import tile_list_kernel
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS
from tests.aot.compiling import Report, compile_source

REGISTER_FILE = 65_536  # 32-bit registers
WARP_GROUP = 128  # threads


def compile_forward(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    tile: HopperTile | HopperSparseTile | None = None,
    is_sparse: bool = False,
    **flags: bool,
) -> Report:
    """As the launcher would specialise it for a contiguous packed batch of causal attention."""
    kernel = hopper_sparse_forward_kernel if is_sparse else hopper_forward_kernel
    tile = tile or (HOPPER_SPARSE_TILES if is_sparse else HOPPER_TILES)[head_dim]
    constants = {name.upper(): value for name, value in tile._asdict().items()}
    constants |= {
        "HEAD_DIM": head_dim,
        "HAS_LEFT": False, "HAS_RIGHT": True, "VISIT_ORDER": VISIT_ORDERS.index(VISIT_ORDER), **flags,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    tensor = torch.empty((4, 2, head_dim), dtype=dtype)
    types = {
        "q_desc": hopper.ragged_descriptor(tensor, ROWS.value),
        "k_desc": hopper.ragged_descriptor(tensor, tile.block_n),
        "v_desc": hopper.ragged_descriptor(tensor, tile.block_n),
        "out_desc": hopper.ragged_descriptor(tensor, ROWS.value),
        "out_ptr": tensor, "lse_ptr": tensor.float(), "tiles_ptr": tensor.int(), "last_tile_ptr": tensor.int(),
        "threshold_ptr": tensor.float(), "block_bits_ptr": tensor.int(), "counts_ptr": tensor.long(),
        "softmax_scale": 1.5,
    }  # fmt: skip
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else mangle_type(types.get(name, 3), True)
        if name.endswith("_ptr"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return compile_source(GluonASTSource(kernel, signature, constants, attrs), "sm_90", num_warps=4)


def find_faults(report: Report) -> list[str]:
    faults = []
    if report.shared > SHARED_MEMORY["sm_90"]:
        faults.append(f"more shared memory than {SHARED_MEMORY['sm_90']} bytes")
    if report.spilled:
        faults.append("registers spilled")
    if report.warnings:
        faults.append("warnings")
    if not arrivals_follow_barriers(report.ptx):
        faults.append("an arrival without a barrier before it")
    faults += [f"no {name}" for name in ("wgmma.mma_async", "cp.async.bulk.tensor.5d") if name not in report.ptx]
    return faults


def arrivals_follow_barriers(ptx: str) -> bool:
    """One thread arrives for its warp or warp group, which must have come that far: another may still be reading what
    the arrival gives away."""
    steps = re.findall(r"bar\.(?:warp\.)?sync|wgmma\.\w+|mbarrier\.try_wait|mbarrier\.arrive(?!\.expect_tx)", ptx)
    return all(before.startswith("bar.") for before, step in itertools.pairwise(steps) if step == "mbarrier.arrive")


def check(*configuration, **flags) -> Report:
    report = compile_forward(*configuration, **flags)
    faults = find_faults(report)
    assert not faults, (
        f"{'; '.join(faults)} (shared memory {report.shared} bytes, {report.registers} registers, "
        f"{report.spilled} bytes spilled, ptxas warnings {report.warnings})"
    )
    return report


@pytest.mark.parametrize("head_dim", HOPPER_TILES)
def test_causal(head_dim: int):
    check(head_dim)


@pytest.mark.parametrize("head_dim", HOPPER_SPARSE_TILES)
def test_sparse(head_dim: int):
    """Votes and exponentials are under way while a product ends; nobody waits for them one after the other."""
    report = check(head_dim, is_sparse=True)
    steps = re.findall(r"wgmma\.wait\w*|vote\.sync|mbarrier\.try_wait|ex2", report.ptx)
    runs = " ".join(step for step, _ in itertools.groupby(steps))
    assert "vote.sync ex2 wgmma.wait_group" in runs


@pytest.mark.parametrize("index_dtype", ["i32", "i64"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
def test_tile_list(is_packed: bool, index_dtype: str):
    constants = {
        "HEAD_DIM": 128, "BLOCK_M": 128, "BLOCK_N": 128, "HAS_LEFT": True, "HAS_RIGHT": True, "IS_PACKED": is_packed,
        "HAS_KEY_MASK": not is_packed, "SKIP_BLOCK_Q": 64,
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else f"*{index_dtype}" if name.startswith("b_") else "i32"
        for name in tile_list_kernel.arg_names
    } | {"tiles_ptr": "*i32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "key_mask_ptr": "*i1"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    report = compile_source(
        ASTSource(tile_list_kernel, signature, constants, attrs), "sm_90", num_warps=hopper.TILE_LIST_WARPS
    )
    assert report.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype", "flags"),
    [
        *[(head_dim, torch.float16, {}) for head_dim in HOPPER_TILES],
        *[(head_dim, torch.bfloat16, {"HAS_LEFT": True}) for head_dim in HOPPER_TILES if head_dim <= 128],
        *[(head_dim, torch.float16, {"is_sparse": True}) for head_dim in HOPPER_SPARSE_TILES],
        *[(head_dim, torch.bfloat16, {"is_sparse": True, "HAS_RIGHT": False}) for head_dim in HOPPER_SPARSE_TILES],
    ],
    ids=str,
)
def test_other_configurations(head_dim: int, dtype: torch.dtype, flags: dict[str, bool]):
    check(head_dim, dtype, **flags)


def test_head_dims():
    assert set(HOPPER_TILES) == set(hopper.HEAD_DIMS)
    assert {n: ((ROWS.value, tile.block_n),) for n, tile in HOPPER_SPARSE_TILES.items()} == hopper.SKIP_BLOCKS


@pytest.mark.parametrize("tile", [*HOPPER_TILES.values(), *HOPPER_SPARSE_TILES.values()], ids=str)
def test_registers_are_there_for_all_roles(tile: HopperTile | HopperSparseTile):
    """A warp group that asks for more than are left waits for ever; the copying warp counts as a group."""
    consumers = CONSUMERS.value if isinstance(tile, HopperSparseTile) else tile.consumers
    groups = consumers * tile.consumer_registers + tile.producer_registers
    at_entry = REGISTER_FILE // WARP_GROUP // (consumers + 1) // 8 * 8
    assert groups <= at_entry * (consumers + 1)
    assert all(n % 8 == 0 and 24 <= n <= 256 for n in (tile.consumer_registers, tile.producer_registers))


@pytest.mark.slow
def test_faults_are_found():
    with pytest.raises(AssertionError, match=r"registers spilled.*, [1-9]\d* bytes spilled"):
        check(128, tile=HopperTile(128, 2, 3, 136, 24))
    with pytest.raises(AssertionError, match=re.escape("more shared memory than 232448 bytes")):
        check(64, tile=HopperTile(128, 8, 2, 240, 24))


def test_a_faulty_report_is_faulted():
    clean = Report(1000, 168, 0, (), "wgmma.mma_async cp.async.bulk.tensor.5d")
    assert find_faults(clean) == []
    faulty = Report(300_000, 168, 8, ("C7515",), "wgmma.mma_async")
    assert not arrivals_follow_barriers("bar.sync 0, 128; wgmma.wait_group.sync.aligned 0; mbarrier.arrive.shared::cta")
    assert find_faults(faulty) == [
        "more shared memory than 232448 bytes", "registers spilled", "warnings", "no cp.async.bulk.tensor.5d",
    ]  # fmt: skip
