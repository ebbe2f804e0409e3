"""Every row of the tile table, compiled for its architecture: it fits into shared memory, and 16-bit forwards spill
nothing and use the architecture's matrix instruction."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fa_ops.kernels.configs import ARCHITECTURES, HEAD_DIM_ROWS, SHARED_MEMORY, TILES, Tile, select_tile
from fa_ops_meta.skip import BLOCK_SIZES
from tests.aot.compiling import MATRIX_INSTRUCTION, Report, compile_kernel

KERNELS = ("forward", "decode", "dq", "dkv")
LEAST_SHARED_MEMORY = min(SHARED_MEMORY, key=SHARED_MEMORY.__getitem__)
# What `make test` compiles for.
QUICK = ("sm_90", LEAST_SHARED_MEMORY)
ARCHITECTURE_PARAMS = [pytest.param(arch, marks=() if arch in QUICK else pytest.mark.slow) for arch in ARCHITECTURES]
ALL_FEATURES = dict.fromkeys(("HAS_LEFT", "HAS_RIGHT", "HAS_SOFTCAP", "HAS_SINKS", "HAS_KEY_MASK", "HAS_DLSE"), True)


def check(kernel: str, arch: str, tile: Tile, dtype: str, head_dim: int, **flags: bool) -> None:
    """Compiles and raises AssertionError with all that is wrong."""
    report = compile_kernel(kernel, arch, tile, dtype, head_dim, **flags)
    faults = find_faults(kernel, arch, dtype, report)
    assert not faults, (
        f"{kernel} {arch} {dtype} D {head_dim} {tile}: {'; '.join(faults)} (shared memory {report.shared} bytes, "
        f"{report.registers} registers, {report.spilled} bytes spilled, ptxas warnings {report.warnings})"
    )


def find_faults(kernel: str, arch: str, dtype: str, report: Report) -> list[str]:
    faults = []
    if report.shared > SHARED_MEMORY[arch]:
        faults.append(f"more shared memory than {SHARED_MEMORY[arch]} bytes")
    if kernel in ("forward", "dq") and arch == "sm_90" and report.warnings:
        faults.append("matrix instructions serialized")
    if kernel in ("forward", "decode", "combine") and dtype != "fp32":
        if report.spilled:
            faults.append("registers spilled")
        # the tiles of decoding have 16 rows, fewer than those of later architectures' own instructions
        instruction = {"forward": MATRIX_INSTRUCTION[arch], "decode": "mma.sync", "combine": ""}[kernel]
        if instruction not in report.ptx:
            faults.append(f"no {instruction}")
    return faults


def rows() -> list:
    """`make test` has 16 bits for QUICK, and float32, seconds for each, for the least shared memory alone."""
    quick = {*itertools.product(("bf16",), QUICK), ("fp32", LEAST_SHARED_MEMORY)}
    return [
        pytest.param(
            kernel, arch, dtype, head_dim, id=f"{kernel}-{dtype}-{arch}-{head_dim}",
            marks=() if (dtype, arch) in quick else pytest.mark.slow,
        )
        for kernel in KERNELS for dtype in ("bf16", "fp32") for arch in ARCHITECTURES for head_dim in HEAD_DIM_ROWS
    ]  # fmt: skip


@pytest.mark.parametrize(("kernel", "arch", "dtype", "head_dim"), rows())
def test_row(kernel: str, arch: str, dtype: str, head_dim: int):
    check(kernel, arch, select_tile(kernel, arch, head_dim, head_dim, dtype == "fp32"), dtype, head_dim)


@pytest.mark.parametrize(
    ("kernel", "sides"),
    [
        ("forward", ()),
        ("forward", ("HAS_LEFT",)),
        ("forward", ("HAS_LEFT", "HAS_RIGHT")),
        ("dq", ("HAS_LEFT", "HAS_RIGHT")),
    ],
    ids=["forward-full", "forward-left", "forward-window", "dq-window"],
)  # fmt: skip
@pytest.mark.parametrize("head_dim", [128, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 256))])
def test_matrix_instructions_of_sm_90_overlap(kernel: str, head_dim: int, sides: tuple[str, ...]):
    """Those of causal attention are in test_row; the backward always has a right side."""
    flags = {side: side in sides for side in ("HAS_LEFT", "HAS_RIGHT")}
    check(kernel, "sm_90", select_tile(kernel, "sm_90", head_dim, head_dim, False), "bf16", head_dim, **flags)


@pytest.mark.parametrize("arch", ARCHITECTURE_PARAMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_features_at_once(kernel: str, arch: str):
    check(kernel, arch, select_tile(kernel, arch, 128, 128, False), "bf16", 128, IS_PACKED=False, **ALL_FEATURES)


def skip_rows() -> list:
    """Every pair of block sizes at D 128; `make test` has the default one and the smallest, for two architectures."""
    quick = list(itertools.product(QUICK, ((64, 128), (16, 16))))
    return [
        pytest.param(
            kernel, arch, blocks, id=f"{kernel}-{arch}-{blocks[0]}x{blocks[1]}",
            marks=() if (arch, blocks) in quick else pytest.mark.slow,
        )
        for kernel in KERNELS for arch in ARCHITECTURES for blocks in itertools.product(BLOCK_SIZES, repeat=2)
    ]  # fmt: skip


@pytest.mark.parametrize(("kernel", "arch", "blocks"), skip_rows())
def test_skip_softmax_fits(kernel: str, arch: str, blocks: tuple[int, int]):
    tile = select_tile(kernel, arch, 128, 128, False, blocks)
    sizes = {"SKIP_BLOCK_Q": blocks[0], "SKIP_BLOCK_K": blocks[1]}
    report = compile_kernel(kernel, arch, tile, "bf16", 128, SKIP_SOFTMAX=True, **sizes)
    assert report.shared <= SHARED_MEMORY[arch]
    assert not report.warnings
    assert MATRIX_INSTRUCTION[arch] in report.ptx or arch in ("sm_90", "sm_100")  # theirs take 64 rows at the least


@pytest.mark.parametrize("kernel", ["forward", "decode"])
def test_numbers_may_be_constants(kernel: str):
    """torch 2.11 makes constants of them to find out what a kernel writes; where that fails, it takes all tensors for
    written, and cannot compile a call with a threshold for all heads."""
    sizes = {"SKIP_BLOCK_Q": 64, "SKIP_BLOCK_K": 128, "num_seqs": 3, "rows_q": 5, "rows_k": 7}
    tile = select_tile(kernel, "sm_90", 128, 128, False, (64, 128))
    assert compile_kernel(kernel, "sm_90", tile, "bf16", 128, SKIP_SOFTMAX=True, **sizes).ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_combine(arch: str):
    check("combine", arch, Tile(1, 16, 8, 1), "bf16", 256, HAS_SINKS=True)


@pytest.mark.parametrize("paging", [1, 2], ids=["whole_blocks", "single_keys"])
@pytest.mark.parametrize("arch", ["sm_90", pytest.param(LEAST_SHARED_MEMORY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["forward", "decode"])
def test_paged_caches(kernel: str, arch: str, paging: int):
    flags = {"PAGING": paging, "LEAVES_SINGLE_ROWS": True}
    check(kernel, arch, select_tile(kernel, arch, 128, 128, False), "bf16", 128, **flags)


@pytest.mark.parametrize("arch", ARCHITECTURE_PARAMS)
def test_counting_fits(arch: str):
    """The default blocks, and every feature at the largest head."""
    plain = compile_kernel("counting", arch, select_tile("forward", arch, 128, 128, False, (64, 128)), "bf16", 128)
    assert plain.spilled == 0
    assert MATRIX_INSTRUCTION[arch] in plain.ptx
    widest = select_tile("forward", arch, 256, 256, False, (64, 128))
    assert compile_kernel("counting", arch, widest, "bf16", 256, **ALL_FEATURES).shared <= SHARED_MEMORY[arch]


def test_table_has_no_other_rows():
    assert set(TILES) == {(kernel, is_float32) for kernel in KERNELS for is_float32 in (False, True)}
    for rows in TILES.values():
        assert set(rows) == set(ARCHITECTURES)
        assert {len(tiles) for tiles in rows.values()} == {len(HEAD_DIM_ROWS)}


def test_a_tile_too_big_is_found():
    with pytest.raises(AssertionError, match=r"more shared memory than 101376 bytes.*shared memory \d{6} bytes"):
        check("forward", "sm_120", Tile(128, 128, 8, 3), "bf16", 128)


def test_spilled_registers_are_found():
    with pytest.raises(AssertionError, match=r"registers spilled.*, [1-9]\d* bytes spilled"):
        check("forward", "sm_80", Tile(128, 64, 4, 1), "bf16", 128)


def test_serialized_matrix_instructions_are_found():
    report = Report(shared=0, registers=0, spilled=0, warnings=("C7515",), ptx="wgmma.mma_async")
    assert find_faults("forward", "sm_90", "bf16", report) == ["matrix instructions serialized"]


def test_a_missing_matrix_instruction_is_found():
    # sm_100's takes 64 rows at the least
    with pytest.raises(AssertionError, match=r"no tcgen05\.mma"):
        check("forward", "sm_100", Tile(32, 32, 4, 1), "bf16", 64)


def test_refuses_interpreted_kernels():
    run = subprocess.run(
        [sys.executable, "-c", "import tests.aot.compiling"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "TRITON_INTERPRET=1 is set" in run.stderr
