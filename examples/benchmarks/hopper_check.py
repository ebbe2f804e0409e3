"""The first thing to run when the sm_90 forward kernel meets a GPU: results from the smallest case up, then speed.

    python examples/benchmarks/hopper_check.py [--head-dims 64 128 256] [--no-timing] [--tiles 128,2,3,160,32 ...]

Each stage says what it is before it starts and how it went after it; one that takes longer than --limit seconds is a
hang, and ends the process with a traceback. Errors are against float64, beside those of the portable kernel; a stage
whose error is more than twice the portable kernel's, or whose result has NaN, is WRONG, and the exit status is 1.
A tile is BLOCK_N,slots,consumers,registers of a consumer's thread,registers of the producer's; without --tiles the
table's own are timed.
"""

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from cases import Case
from peers import make_data
from timing import CudaClock
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_ops
from fa_ops import hopper
from fa_ops.kernels import tier
from fa_ops.kernels.configs import HOPPER_TILES, HopperTile
from fa_ops.reference import attention_reference

# name: lengths of the queries, of the keys, query heads, key heads, causal, window
STAGES = {
    "one tile, one block": ((20,), None, 1, 1, False, (-1, -1)),
    "one tile, two blocks": ((100,), (200,), 1, 1, False, (-1, -1)),
    "each slot used again": ((64,), (1000,), 1, 1, False, (-1, -1)),
    "causal": ((500,), None, 1, 1, True, (-1, -1)),
    "several tiles for each program": ((4000,), None, 16, 16, True, (-1, -1)),
    "sequences, GQA": ((1, 0, 300, 129, 64, 700), None, 8, 2, True, (-1, -1)),
    "more keys than queries, and fewer": ((100, 300, 5), (400, 50, 0), 4, 4, True, (-1, -1)),
    "window": ((900, 40), None, 4, 4, False, (200, 30)),
}
REPEATS = 200
ROUNDS = 20


def attend(q: Tensor, k: Tensor, v: Tensor, lens_q: Tensor, lens_k: Tensor, is_hopper: bool, **options) -> Tensor:
    tier.TIER = "auto" if is_hopper else "portable"
    starts_q, starts_k = lens_q.cumsum(0) - lens_q, lens_k.cumsum(0) - lens_k
    return fa_ops.attention(
        q, k, v, starts_q, lens_q, b_start_loc_k=starts_k, b_seq_len_k=lens_k, max_input_len_k=0, **options
    )


def check(head_dim: int, name: str) -> bool:
    lens_q, lens_k, heads, heads_kv, is_causal, window = STAGES[name]
    lens = [torch.tensor(n, device="cuda") for n in (lens_q, lens_k or lens_q)]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(int(n.sum()), h, head_dim, device="cuda", generator=generator).bfloat16()
        for n, h in ((lens[0], heads), (lens[1], heads_kv), (lens[1], heads_kv))
    )
    options = {"is_causal": is_causal, "window_size": window}
    found = attend(q, k, v, *lens, is_hopper=True, **options)
    torch.cuda.synchronize()
    starts = [n.cumsum(0) - n for n in lens]
    exact = attention_reference(
        q.double(), k.double(), v.double(), starts[0], lens[0],
        b_start_loc_k=starts[1], b_seq_len_k=lens[1], max_input_len_k=0, **options,
    )  # fmt: skip
    error, portable_error = (
        float((out.double() - exact).abs().max()) for out in (found, attend(q, k, v, *lens, is_hopper=False, **options))
    )
    is_right = error <= 2 * portable_error
    print(f"error {error:.2e}, portable kernel {portable_error:.2e}{'' if is_right else ' WRONG'}", end=" ")
    return is_right


def check_repeats(head_dim: int) -> bool:
    lens = torch.tensor([1, 700, 0, 333, 2000], device="cuda")
    q, k, v = torch.randn(3, int(lens.sum()), 8, head_dim, device="cuda").bfloat16()
    first = attend(q, k, v, lens, lens, is_hopper=True)
    differing = sum(not torch.equal(first, attend(q, k, v, lens, lens, is_hopper=True)) for _ in range(REPEATS))
    print(f"{differing} differ{' WRONG' if differing else ''}", end=" ")
    return differing == 0


def speed(head_dim: int, is_causal: bool, length: int) -> bool:
    """TFLOP/s by the medians of ROUNDS launches taken in turn."""
    heads, lengths = 2048 // head_dim, (length,) * (16_384 // length)
    case = Case("hopper_check", "bfloat16", heads, heads, head_dim, lengths, is_causal, ())
    data = make_data(case, "cuda")
    ours = partial(attend, data.q, data.k, data.v, data.lengths, data.lengths, is_causal=is_causal)
    padded = [t.unflatten(0, (-1, length)).transpose(1, 2) for t in (data.q, data.k, data.v)]

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*padded, is_causal=is_causal)

    runs: dict[str, Callable] = {"sm_90": partial(ours, is_hopper=True), "portable": partial(ours, is_hopper=False)}
    runs["cuDNN"] = cudnn
    clock, samples = CudaClock(), {name: [] for name in runs}
    for _ in range(ROUNDS + 2):
        clock.begin_round()
        events = {}
        for name, run in runs.items():
            start = clock.start()
            run()
            events[name] = start, clock.stop()
        for name, pair in events.items():
            samples[name].append(clock.milliseconds(*pair))
    for name, times in samples.items():
        print(f"{name} {case.flops('forward') / sorted(times[2:])[ROUNDS // 2] / 1e9:.0f}", end="  ")
    return True


def run_stage(name: str, limit: float, stage: Callable[[], bool]) -> bool:
    print(f"{name} ...", end=" ", flush=True)
    faulthandler.dump_traceback_later(limit, exit=True)
    start = time.perf_counter()
    is_right = stage()
    torch.cuda.synchronize()
    faulthandler.cancel_dump_traceback_later()
    print(f"({time.perf_counter() - start:.1f} s)", flush=True)
    return is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HOPPER_TILES), choices=list(HOPPER_TILES))
    parser.add_argument("--tiles", nargs="+", help="to be timed, for a single head dimension")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a stage, compilation included")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {hopper._triton_version()}", flush=True)
    is_right = True
    with torch.no_grad():
        for head_dim in args.head_dims:
            for name, (*_, window) in STAGES.items():
                if head_dim <= 128 or window[0] < 0:
                    is_right &= run_stage(f"D {head_dim}: {name}", args.limit, partial(check, head_dim, name))
            is_right &= run_stage(
                f"D {head_dim}: {REPEATS} repeats, bit for bit", args.limit, partial(check_repeats, head_dim)
            )
        tiles = {n: [HOPPER_TILES[n]] for n in args.head_dims}
        if args.tiles:
            tiles = {args.head_dims[0]: [HopperTile(*map(int, tile.split(","))) for tile in args.tiles]}
        for head_dim, candidates in ({} if args.no_timing or not is_right else tiles).items():
            for tile in candidates:
                HOPPER_TILES[head_dim] = tile
                for length, is_causal in ((16_384, True), (16_384, False), (2048, True)):
                    name = f"D {head_dim}, {length} {'causal' if is_causal else 'full'}, {tuple(tile)}, TFLOP/s"
                    run_stage(name, args.limit, partial(speed, head_dim, is_causal, length))
    print("all right" if is_right else "WRONG")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
