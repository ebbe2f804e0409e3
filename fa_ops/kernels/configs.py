"""The tile table: block sizes, warps and pipeline stages by architecture, kernel, precision and head dimension.

Fixed, not autotuned: a result never depends on timing, on a neighbour in the batch or on a length, and a test compiles
every row for every architecture.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class HopperTile(NamedTuple):
    """Keys of a block, slots for blocks in shared memory, warp groups of 64 query rows, registers of their threads and
    of the copying warp's."""

    block_n: int
    stages: int
    consumers: int
    consumer_registers: int
    producer_registers: int


class HopperSparseTile(NamedTuple):
    """Keys of a block, slots for blocks of K and of V, registers of a warp group's threads and the copying warp's."""

    block_n: int
    k_stages: int
    v_stages: int
    consumer_registers: int
    producer_registers: int


HEAD_DIM_ROWS = (64, 128, 256)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
INTERPRETER_TILE = Tile(16, 32, 1, 1)

# shared memory of one block, bytes
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}

# (kernel, has 32-bit elements): {architecture: tiles for HEAD_DIM_ROWS}
TILES: dict[tuple[str, bool], dict[str, tuple[Tile, Tile, Tile]]] = {
    ("forward", False): {
        "sm_80": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
        "sm_90": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        "sm_100": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        "sm_120": (Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    ("dq", False): {
        "sm_80": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 8, 1)),
        "sm_90": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        "sm_100": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
        "sm_120": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    },
    ("dkv", False): {
        "sm_80": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 1)),
        "sm_90": (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 2)),
        "sm_100": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1)),
        "sm_120": (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
    },
    ("decode", False): {  # rows are the query heads of a key head, whatever the table says
        "sm_80": (Tile(16, 128, 4, 3), Tile(16, 64, 4, 3), Tile(16, 32, 4, 3)),
        "sm_90": (Tile(16, 128, 4, 3), Tile(16, 64, 4, 3), Tile(16, 32, 4, 3)),
        "sm_100": (Tile(16, 128, 4, 3), Tile(16, 64, 4, 3), Tile(16, 32, 4, 3)),
        "sm_120": (Tile(16, 64, 4, 3), Tile(16, 32, 4, 3), Tile(16, 32, 4, 2)),
    },
    **{
        (kernel, True): {arch: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)) for arch in ARCHITECTURES}
        for kernel in ("forward", "decode", "dq", "dkv")
    },
}

# by head dimension
HOPPER_TILES = {
    64: HopperTile(128, 2, 3, 160, 32),
    128: HopperTile(128, 2, 2, 240, 24),
    256: HopperTile(64, 2, 2, 240, 24),
}
# with skip-softmax: BLOCK_N is a part of what is computed, and a warp group's rows are those of a block
HOPPER_SPARSE_TILES = {
    64: HopperSparseTile(128, 3, 2, 240, 24),
    128: HopperSparseTile(128, 3, 2, 240, 24),
    256: HopperSparseTile(64, 3, 2, 240, 24),
}

# by head dimension: for dQ, with two slots or more; for dK and dV, with 64 keys for a warp group and blocks of queries
HOPPER_BACKWARD_TILES = {
    64: (HopperTile(64, 4, 2, 240, 24), HopperTile(128, 4, 2, 240, 24)),
    128: (HopperTile(64, 4, 2, 240, 24), HopperTile(64, 2, 2, 240, 24)),
}


def architecture(major: int, minor: int) -> str:
    """The row of the table for a compute capability: the newest that runs there within its shared memory."""
    if major >= 12 or (major, minor) in ((8, 6), (8, 9)):
        return "sm_120"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def block_dim(head_dim: int) -> int:
    """A head dimension as the kernels hold it: the next power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def select_tile(
    kernel: str, arch: str, head_dim: int, head_dim_v: int, is_float32: bool, skip_blocks: tuple[int, int] | None = None
) -> Tile:
    """The tile of `kernel` ("forward", "decode", "dq" or "dkv") on `arch` for these head dimensions.

    With blocks of skip-softmax, (query rows, keys), the forward's tile has the rows of a block, and no tile is larger
    than one.
    """
    widest = max(head_dim, head_dim_v)
    tile = INTERPRETER_TILE
    if arch != "interpreter":
        row = next(i for i, size in enumerate(HEAD_DIM_ROWS) if widest <= size)
        tile = TILES[kernel, is_float32][arch][row]
    if skip_blocks is None:
        return tile
    block_q, block_k = skip_blocks
    if kernel == "decode":
        is_large = block_dim(widest) * block_k * (1 + is_float32) > 128 * 128
        return Tile(tile.block_m, block_k, 8 if is_large else 4, 1)
    if kernel != "forward":
        return tile._replace(block_m=min(tile.block_m, block_q), block_n=min(tile.block_n, block_k))
    block_n = min(tile.block_n, block_k)
    is_large = block_q * (block_dim(widest) + block_n) * (1 + is_float32) > 64 * 256
    return Tile(block_q, block_n, 8 if is_large else 4, tile.num_stages)
