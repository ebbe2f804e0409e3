"""What every kernel launch needs: Triton, if it is there, the tile, the grid, the strides of the arguments, and the
launch itself."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from torch.library import wrap_triton

from fa_ops_meta import checks

try:
    import triton
except ImportError:
    HAS_TRITON = IS_INTERPRETED = False
else:
    from fa_ops.kernels.configs import Tile, architecture, select_tile
    from fa_ops.kernels.primitives import CLEAR_ROWS

    HAS_TRITON = True
    IS_INTERPRETED = triton.knobs.runtime.interpret


INTERPRETED_MULTI_PROCESSORS = 16
MAX_COMPILED = 1024  # of a kernel; each is a dictionary's entry, most name the same few kernels
FLOATS = ("softmax_scale", "softcap")  # arguments of kernels, float32 whatever they are
_ADDRESS, _DTYPE = operator.methodcaller("data_ptr"), operator.attrgetter("dtype")
_BLOCK = operator.attrgetter("base.dtype", "block_shape", "layout")


@functools.cache
def multi_processors(device: torch.device) -> int:
    """Of a GPU; a number in the interpreter."""
    if device.type == "cpu":
        return INTERPRETED_MULTI_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take row maxima before scaling; the sign is not turned in them, where every product would then load
    q anew from shared memory."""
    return (-q, -scale) if scale < 0 else (q, scale)


def strides_of(t: Tensor) -> tuple[int, int, int]:
    """(batch or page, row, head) strides; packed tensors have no batch."""
    *batch, stride_t, stride_h, _ = t.stride()
    return (batch[0] if batch else 0), stride_t, stride_h


def lse_strides(lse: Tensor) -> tuple[int, int]:
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def dlse_strides(dlse: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 1) if dlse is None else (*lse_strides(dlse), dlse.stride(-1))


def mask_strides(key_mask: Tensor | None) -> tuple[int, int]:
    return (0, 1) if key_mask is None else (key_mask.stride(0), key_mask.stride(1))


def leading_strides(t: Tensor | None) -> tuple[int, int]:
    """The first two, of a threshold (B, Hq), of block_bits (Hq, tiles, words), of a block_table (B, pages)."""
    return (0, 0) if t is None or t.dim() < 2 else (t.stride(0), t.stride(1))


def page_counts(k: Tensor, block_table: Tensor | None) -> tuple[int, int]:
    """Rows of a page, and pages; of no meaning without a block_table."""
    return (1, 1) if block_table is None else (k.shape[1], k.shape[0])


def paging(k: Tensor, block_table: Tensor | None, block_n: int) -> int:
    """How the kernels find the keys of a block, PAGING of `fa_ops.kernels.primitives.find_keys`."""
    if block_table is None:
        return 0
    return 1 if k.shape[1] % block_n == 0 else 2


def require_triton(q: Tensor) -> None:
    if not HAS_TRITON:
        raise ImportError(f"q: device {q.device} given, and Triton is not installed: `pip install triton` (Linux)")


def grid(num_seqs: int, rows: int, block: int, heads: int, is_packed: bool) -> tuple[int, int]:
    """Enough tiles for any lengths: nothing is read back from the device to count them."""
    tiles = (rows + block - 1) // block
    return (tiles + num_seqs if is_packed else num_seqs * tiles), heads


def clearing_grid(num_seqs: int, rows: int, block: int, heads: int, is_packed: bool) -> tuple[int, int]:
    """Beside the tiles, if packed, a program for each CLEAR_ROWS rows, which clears those of no sequence."""
    tiles, _ = grid(num_seqs, rows, block, heads, is_packed)
    rows_at_once = CLEAR_ROWS.value * heads
    return (tiles + (rows + rows_at_once - 1) // rows_at_once if is_packed else tiles), heads


def tile_of(kernel: str, q: Tensor, v: Tensor, skip_blocks: tuple[int, int] | None) -> "Tile":
    arch = "interpreter" if q.device.type == "cpu" else architecture_of(q.device)
    return select_tile(kernel, arch, q.shape[-1], v.shape[-1], q.dtype == torch.float32, skip_blocks)


def tile_constants(tile: "Tile") -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.num_warps, "num_stages": tile.num_stages
    }  # fmt: skip


@functools.cache
def architecture_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    checks.check_capability(major, minor, torch.cuda.get_device_name(device))
    return architecture(major, minor)


def device_of(t: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(t)


def launch_kernel(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]) -> None:
    """Launches a kernel from the body of a `triton_op`: recorded where the body is traced, else `launch_compiled`."""
    if not IS_INTERPRETED and is_wrap_triton_enabled():
        wrap_triton(kernel)[grid](*args, **constants)
    else:
        launch_compiled(kernel, grid, args, constants)


def launch_compiled(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]) -> Any:
    """`kernel[grid](*args, **constants)` on the current device, for less: Triton asks of each of some 60 arguments what
    to specialise the kernel for. Here the compiled kernel is found by what the answers depend on.

    Profilers' hooks of launches are called. Hooks that run before Triton looks at the arguments make it do so; Triton's
    knobs of compilation are read at a kernel's first launch of a kind only.

    Args:
        args: all that is not a constexpr, on the current device; block_shape of a descriptor is a tuple.
        constants: constexprs, num_warps, num_stages.

    Returns:
        The compiled kernel, if it will do for all arguments that differ from these in addresses alone, multiples of 16.
    """
    if IS_INTERPRETED:
        return kernel[grid](*args, **constants)
    launches = _launches_of(kernel)
    pointers = launches.pointers(args)
    addresses = [*map(_ADDRESS, pointers)]
    if not _are_aligned(addresses) or max(launches.counts(args)) >= 2**31 or kernel.pre_run_hooks:
        kernel[grid](*args, **constants)
        return None
    key = (
        pointers[0].get_device(), *map(_DTYPE, pointers), *map(_BLOCK, launches.descriptors(args)),
        *launches.sizes(args), *constants.values(),
    )  # fmt: skip
    compiled = launches.compiled.get(key)
    if compiled is None:
        if len(launches.compiled) == MAX_COMPILED:
            launches.compiled.clear()
        compiled = launches.compiled[key] = kernel[grid](*args, **constants)
    else:
        launches.run(compiled, grid, args, addresses, launches.constexprs(constants))
    return compiled


class Launch:
    """`launch_compiled`, over and over, of one kernel on one grid of one device. From call to call pointers may change,
    and floats: no sizes, no counts, of a descriptor no more than its base."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self.compiled: dict[tuple[torch.dtype, ...], Any] = {}
        if not IS_INTERPRETED:
            self.launches = _launches_of(kernel)
            self.constexprs = self.launches.constexprs(constants)

    def __call__(self, *args: Any) -> None:
        if IS_INTERPRETED or self.kernel.pre_run_hooks:
            self.kernel[self.grid](*args, **self.constants)
            return
        pointers = self.launches.pointers(args)
        addresses, dtypes = [*map(_ADDRESS, pointers)], (*map(_DTYPE, pointers),)
        compiled = self.compiled.get(dtypes)
        if compiled is not None and _are_aligned(addresses):
            self.launches.run(compiled, self.grid, args, addresses, self.constexprs)
            return
        compiled = launch_compiled(self.kernel, self.grid, args, self.constants)
        if compiled is not None:
            self.compiled[dtypes] = compiled


def remember(function: Callable) -> Callable:
    """`function`, asked once for each kind of call: it may read dtypes, devices, shapes, strides and offsets of real
    tensors, no more. An error is no answer, and not remembered. The interpreter's tests replace what it would call."""
    answers: dict[tuple, Any] = {}

    @functools.wraps(function)
    def ask(*args: Any) -> Any:
        key: list = []
        for x in args:
            if isinstance(x, Tensor):
                if x.layout is not torch.strided:
                    return function(*args)
                key += x.dtype, x.device, x.shape, x.stride(), x.storage_offset()
            else:
                key.append(x)
        kind = tuple(key)
        answer = answers.get(kind, answers)
        if answer is answers:
            answer = function(*args)
            if len(answers) >= MAX_COMPILED:
                answers.clear()
            answers[kind] = answer
        return answer

    return function if IS_INTERPRETED else ask


def _are_aligned(addresses: list[int]) -> bool:
    return functools.reduce(operator.or_, addresses) % 16 == 0


def _is_hooked() -> bool:
    """Whether a profiler wants to hear of launches. Triton's knobs are chains of hooks, or what a user put there."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class _Launches:
    """A kernel's compiled forms, and what of the arguments they depend on: types of all, values of integers that Triton
    specialises for. Of other integers it matters that 32 bits hold them, of addresses that they are multiples of 16."""

    def __init__(self, kernel: Any) -> None:
        params = [p for p in kernel.params if not p.is_constexpr]
        kinds = "pointer", "descriptor", "count", "size"
        self.indices = {kind: [i for i, p in enumerate(params) if _kind(p) == kind] for kind in kinds}
        self.pointers, self.descriptors, self.counts, self.sizes = map(_pick, self.indices.values())
        self.constexprs = operator.itemgetter(*(p.name for p in kernel.params if p.is_constexpr))
        self.compiled: dict[tuple, Any] = {}

    def run(self, compiled: Any, grid: tuple, args: Sequence[Any], addresses: list[int], constexprs: tuple) -> None:
        """`compiled[grid](*args, *constexprs)`, but that nobody is told where nobody listens. `addresses` are those of
        the pointers among args: the launcher takes them as they are, and of tensors it asks the driver."""
        grid_x, grid_y, grid_z, *_ = *grid, 1, 1
        if _is_hooked():
            compiled[grid_x, grid_y, grid_z](*args, *constexprs)
            return
        args = list(args)
        device = args[self.indices["pointer"][0]].get_device()
        for index, address in zip(self.indices["pointer"], addresses, strict=True):
            args[index] = address
        compiled.run(
            grid_x, grid_y, grid_z, triton.runtime.driver.active.get_current_stream(device), compiled.function,
            compiled.packed_metadata, None, None, None, *args, *constexprs,
        )  # fmt: skip


def _kind(param: Any) -> str:
    if param.name.endswith("_ptr"):
        return "pointer"
    if param.name.endswith("_desc"):
        return "descriptor"
    if param.name in FLOATS:
        return "float"
    return "count" if param.do_not_specialize else "size"


def _pick(indices: list[int]) -> Callable[[Sequence[Any]], tuple]:
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda args: tuple(args[i] for i in indices)


_launches_of = functools.cache(_Launches)
