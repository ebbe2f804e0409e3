"""Times the portable kernels over tile configurations on this CUDA card and prints the best of each head dimension.

    python examples/benchmarks/tune_portable.py [--kernels forward dq dkv] [--head-dims 64 128 256] [--full]
        [--tiles 128,128,8,3 128,64,4,3 ...]

A tile is BLOCK_M,BLOCK_N,warps,stages; without --tiles, all that could fit the registers and shared memory of an SM are
tried. Kernels are compiled in parallel first. Every kernel is timed alone (CUDA events around its launch, L2 flushed),
in two passes over all tiles, whose medians are both printed: a lead smaller than their difference is noise. Results are
compared with those of the table's own tile. What is printed goes into fa_ops/kernels/configs.py by hand.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from cases import Case
from comparing import error_text, packed_results, relative_difference
from peers import make_data, ours
from timing import CudaClock

import fa_ops.ops
from fa_ops.kernels.configs import HEAD_DIM_ROWS, SHARED_MEMORY, TILES, Tile, architecture

KERNELS = {"forward": "attention_forward_kernel", "dq": "attention_backward_dq_kernel"}
KERNELS |= {"dkv": "attention_backward_dkv_kernel"}
DIRECTIONS = {"forward": "forward", "dq": "backward", "dkv": "backward"}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
STAGES = {"forward": (2, 3, 4), "dq": (1, 2, 3), "dkv": (1, 2, 3)}
ACCUMULATOR_REGISTERS = 224  # of the 255 that a thread has
TOLERANCE = 3e-2
REPEATS = 10


def candidates(kernel: str, head_dim: int, shared_memory: int) -> list[Tile]:
    """The tiles whose float32 accumulators could fit the registers and whose 16-bit loads could fit shared memory."""
    sizes = itertools.product((64, 128), (16, 32, 64, 128), (4, 8), STAGES[kernel])
    if kernel == "dkv":
        sizes = itertools.product((32, 64, 128), (64, 128), (4, 8), STAGES[kernel])
    return [tile for tile in itertools.starmap(Tile, sizes) if could_fit(kernel, tile, head_dim, shared_memory)]


def could_fit(kernel: str, tile: Tile, head_dim: int, shared_memory: int) -> bool:
    m, n = tile.block_m, tile.block_n
    accumulators = {
        "forward": m * head_dim + m * n,
        "dq": m * head_dim + 2 * m * n,
        "dkv": 2 * n * head_dim + 2 * m * n,
    }
    loaded_per_stage = 2 * head_dim * (m if kernel == "dkv" else n)
    return (
        accumulators[kernel] <= ACCUMULATOR_REGISTERS * 32 * tile.num_warps
        and 2 * loaded_per_stage * tile.num_stages <= shared_memory
    )


@contextlib.contextmanager
def table_row(kernel: str, arch: str, head_dim: int, tile: Tile | None) -> Iterator[None]:
    """The tile table with `tile` in the place of one row; as it is for None."""
    tiles = TILES[kernel, False]
    before = tiles[arch]
    index = HEAD_DIM_ROWS.index(head_dim)
    if tile is not None:
        tiles[arch] = (*before[:index], tile, *before[index + 1 :])
    try:
        yield
    finally:
        tiles[arch] = before


@contextlib.contextmanager
def timed_launches(name: str, clock: CudaClock) -> Iterator[list[tuple[Any, Any]]]:
    """The (start, stop) events of every launch of the kernel of this name."""
    marks: list[tuple[Any, Any]] = []
    launch = fa_ops.ops.launch_kernel

    def timed_launch(kernel: Any, *call: Any) -> None:
        start = clock.start()
        launch(kernel, *call)
        if kernel.__name__ == name:
            marks.append((start, clock.stop()))

    fa_ops.ops.launch_kernel = timed_launch
    try:
        yield marks
    finally:
        fa_ops.ops.launch_kernel = launch


def compile_tile(job: tuple[str, str, int, Tile, Case]) -> None:
    """Fill Triton's cache on disk, in a worker. What fails here fails again, and is reported, when it is timed."""
    kernel, arch, head_dim, tile, case = job
    with table_row(kernel, arch, head_dim, tile), contextlib.suppress(Exception):
        packed_results(ours(case, make_data(case, "cuda")), DIRECTIONS[kernel])


def tune(kernel: str, arch: str, case: Case, tiles: list[Tile], clock: CudaClock) -> None:
    run, direction = ours(case, make_data(case, "cuda")), DIRECTIONS[kernel]
    expected = packed_results(run, direction)
    medians: dict[Tile | None, list[float]] = {None: []}
    for tile in tiles:
        try:
            with table_row(kernel, arch, case.head_dim, tile):
                results = packed_results(run, direction)
        except Exception as error:
            print(f"{label(kernel, case, tile)}  {error_text(error)}")
            continue
        difference = max(relative_difference(*pair) for pair in zip(results, expected, strict=True))
        if difference <= TOLERANCE:
            medians[tile] = []
        else:
            print(f"{label(kernel, case, tile)}  differs from the table's tile by {difference:.1e}")
    for tile in [*medians, *medians]:
        with table_row(kernel, arch, case.head_dim, tile), timed_launches(KERNELS[kernel], clock) as marks:
            clock.begin_round()
            for _ in range(REPEATS):
                packed_results(run, direction)
        medians[tile].append(statistics.median(clock.milliseconds(*pair) for pair in marks))
    flops = case.flops("forward") / 2 * PRODUCTS[kernel]
    for tile, passes in sorted(medians.items(), key=lambda item: min(item[1])):
        times = ", ".join(f"{ms:.3f}" for ms in passes)
        print(f"{label(kernel, case, tile)}  {times} ms  {flops / min(passes) / 1e9:.0f} TFLOP/s in its products")


def label(kernel: str, case: Case, tile: Tile | None) -> str:
    """A line's beginning; None is the tile of the table as it stands."""
    name = "the table's own" if tile is None else ",".join(map(str, tile))
    return f"{kernel:8} D {case.head_dim:<4} {case.name:18} {name:16}"


def parse_tile(text: str) -> Tile:
    return Tile(*map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIM_ROWS, default=list(HEAD_DIM_ROWS))
    parser.add_argument("--tiles", nargs="+", type=parse_tile, help="BLOCK_M,BLOCK_N,warps,stages")
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    arch = architecture(*torch.cuda.get_device_capability())
    work = []
    for kernel, head_dim in itertools.product(options.kernels, options.head_dims):
        batch, heads = max(1, 16384 // options.length), 4096 // head_dim
        shape = ("bfloat16", heads, heads, head_dim)
        name = f"{batch} x {options.length}, {'full' if options.full else 'causal'}"
        case = Case(name, *shape, (options.length,) * batch, not options.full, ("fa_ops",))
        tiny = Case("tiny", *shape, (128,) * batch, not options.full, ("fa_ops",))
        work.append((kernel, case, tiny, options.tiles or candidates(kernel, head_dim, SHARED_MEMORY[arch])))
    jobs = [(kernel, arch, case.head_dim, tile, tiny) for kernel, case, tiny, tiles in work for tile in tiles]
    print(f"compiling {len(jobs)} kernels for {arch}, {torch.cuda.get_device_name()}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=context) as pool:
        list(pool.map(compile_tile, jobs))
    clock = CudaClock()
    for kernel, case, _, tiles in work:
        tune(kernel, arch, case, tiles, clock)


if __name__ == "__main__":
    main()
