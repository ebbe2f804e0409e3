"""Runs a warp-specialised Gluon kernel in Python on CPU tensors: Gluon has no interpreter.

Each role is a thread. Barriers, phases and transaction counts are those of the PTX manual's mbarrier; copies into
shared memory arrive late, and until then the destination holds NaN; products of matrices read their operands when they
are issued and again when they are waited for, and complain if these differ. So a wrong phase, a slot that is used too
early or given back too soon, or a wait that never ends is an error here. Registers, layouts, memory order between
threads and the widths of integers do not exist. Programs run one after the other.
"""

import random
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

HANG_SECONDS = 20.0
COPY_SECONDS = PRODUCT_SECONDS = 1e-3  # at most
PAUSE_SECONDS = 1e-4  # before a wait, at most
POISON = -(2**31)  # integers that nobody has written


class EmulationError(AssertionError):
    """The kernel did what a GPU would not forgive."""


class EmulatedKernel:
    """`kernel[grid](...)` in Python; `module` is where its functions and their globals are. `copies` counts the copies
    into shared memory of the last launch, from each descriptor in the order of the arguments."""

    def __init__(self, module: types.ModuleType, name: str, seed: int = 0):
        self.names, self.name, self.seed = dict(vars(module)), name, seed  # the module's own may be replaced by this

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*args, num_warps: int, **constants) -> None:
            args = [_Descriptor(x) if hasattr(x, "block_shape") else _pointer(x) for x in args]
            for program in range(grid[0]):
                emulated = _Program(program, grid[0], random.Random(f"{self.seed}-{program}"))
                emulated.namespace(self.names)[self.name](*args, **constants)
                emulated.check_end()
            self.copies = [x.copies for x in args if isinstance(x, _Descriptor)]

        return run


def _pointer(x: Any) -> Any:
    return _Pointer(_storage(x), 0) if isinstance(x, Tensor) else x


def _storage(t: Tensor) -> Tensor:
    """All that follows the first element of t in memory, as one dimension."""
    size = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return t.as_strided((size,), (1,), t.storage_offset())


@dataclass
class _Pointer:
    memory: Tensor
    offset: Any

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.memory, self.offset + offset)

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.dtype)


class _Descriptor:
    """A TensorDescriptor; reads as the copy engine does: 64-bit addresses that wrap, zeros out of bounds."""

    def __init__(self, descriptor: Any):
        self.given = descriptor
        self.copies = 0
        self.memory = _storage(descriptor.base)
        self.dtype = descriptor.base.dtype
        self.layout = None
        shape = list(descriptor.block_shape)
        nbytes = torch.Size(shape).numel() * descriptor.base.element_size()
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=nbytes)
        if any(stride * descriptor.base.element_size() % 16 for stride in descriptor.strides[:-1]):
            raise EmulationError(f"strides {descriptor.strides} are no multiples of 16 bytes")

    def read(self, coordinates: list[int]) -> Tensor:
        block = torch.zeros(self.block_type.shape, dtype=self.dtype)
        for index, own in self._rows(coordinates):
            block[index] = self.memory[own]
        return block

    def write(self, coordinates: list[int], block: Tensor) -> None:
        for index, own in self._rows(coordinates):
            self.memory[own] = block[index]

    def _rows(self, coordinates: list[int]) -> Iterator[tuple[tuple, slice]]:
        """Of each row in bounds, where it is in a block at these coordinates, and in memory."""
        coordinates = [*map(int, coordinates)]
        *outer, rows, width = self.block_type.shape
        bounds, strides = self.given.shape, self.given.strides
        first, end = coordinates[-1], min(coordinates[-1] + width, bounds[-1])
        if any(n != 1 for n in outer) or first < 0:
            raise EmulationError(f"a block {self.block_type.shape} at {coordinates}")
        modulus = 2**64 // self.memory.element_size()
        for row in range(rows):
            at = [*coordinates[:-2], coordinates[-2] + row, first]
            if all(0 <= c < bound for c, bound in zip(at, bounds, strict=True)):
                address = sum(c * stride for c, stride in zip(at, strides, strict=True)) % modulus
                if address + end - first > len(self.memory):
                    raise EmulationError(f"element {address} of {len(self.memory)} is copied, for coordinates {at}")
                yield (0,) * len(outer) + (row, slice(end - first)), slice(address, address + end - first)


@dataclass
class _Shared:
    """A view of shared memory."""

    values: Any  # Tensor, or nested lists of barriers

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def shape(self):
        return list(self.values.shape)

    def index(self, i: int) -> Any:
        return _Shared(self.values[i])

    def load(self, layout) -> Tensor:
        return self.values.clone()

    def store(self, value: Tensor) -> None:
        self.values.copy_(value)

    def reshape(self, shape) -> "_Shared":
        return _Shared(self.values.view(tuple(shape)))

    def slice(self, start: int, length: int, dim: int = 0) -> "_Shared":
        return _Shared(self.values.narrow(dim, start, length))

    def permute(self, order) -> "_Shared":
        return _Shared(self.values.permute(order))


class _Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def complete_if_done(self) -> None:
        if self.pending < 0:
            raise EmulationError("more arrivals at a barrier than it was initialised for")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class _Product:
    """An asynchronous product of matrices; its value is that of its operands while it runs."""

    left: Any
    right: _Shared
    acc: Tensor | None
    value: Tensor | None = None
    early: Tensor = field(init=False)

    def __post_init__(self):
        self.early = self._compute()

    def _compute(self) -> Tensor:
        left = self.left.values if isinstance(self.left, _Shared) else self.left
        product = left.float() @ self.right.values.float()
        return product if self.acc is None else self.acc + product

    def finish(self) -> None:
        self.value = self._compute()
        if not torch.equal(self.value.nan_to_num(nan=12345.0), self.early.nan_to_num(nan=12345.0)):
            raise EmulationError("shared memory changed while a product of matrices was reading it")


class _Program:
    """One program: what its roles share, and the language they speak."""

    def __init__(self, index: int, programs: int, rng: random.Random):
        self.index, self.programs, self.rng = index, programs, rng
        self.changed = threading.Condition()
        self.failures: list[BaseException] = []
        self.copies: list[threading.Thread] = []
        self.barriers: list[_Barrier] = []
        self.role = threading.local()
        self.namespaces: dict[int, dict[str, Any]] = {}
        self.language = self._language()

    def namespace(self, given: dict[str, Any]) -> dict[str, Any]:
        """A module's globals with this program's language in place of Gluon's, and so of the modules that its functions
        come from."""
        if id(given) in self.namespaces:
            return self.namespaces[id(given)]
        names = {name: x.value if isinstance(x, triton.language.constexpr) else x for name, x in given.items()}
        self.namespaces[id(given)] = names
        names |= {
            "gl": self.language, "tl": self.language,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: "barrier", init=self._init, wait=self._wait, arrive=self._arrive,
                expect=self._expect,
            ),
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=self._copy, async_copy_shared_to_global=self._copy_out,
                store_wait=self._wait_for_stores,
            ),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait_for_products,
            "fence_async_shared": lambda: None,
        }  # fmt: skip
        for name, x in list(names.items()):
            if isinstance(x, triton.JITFunction):
                is_own = x.fn.__module__ == given["__name__"]
                home = names if is_own else self.namespace(x.fn.__globals__)
                names[name] = types.FunctionType(x.fn.__code__, home, name, x.fn.__defaults__)
        return names

    def check_end(self) -> None:
        for copy in self.copies:
            copy.join()
        self._raise_failures()
        if any(barrier.bytes for barrier in self.barriers):
            raise EmulationError("a barrier still waits for bytes at the end")
        if self._products():
            raise EmulationError("products of matrices were never waited for")

    def _raise_failures(self) -> None:
        if self.failures:
            raise self.failures[0]

    def _language(self) -> types.SimpleNamespace:
        def same(x, *_):
            return x

        return types.SimpleNamespace(
            float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int64=torch.int64, int32=torch.int32,
            int16=torch.int16, constexpr=None, static_range=range, static_assert=_static_assert,
            NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None,
            BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
            program_id=lambda axis: self.index, num_programs=lambda axis: self.programs,
            allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            load=_load, store=_store,
            atomic_add=self._add,
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            convert_layout=same, cast=_cast, split=lambda x: x.unbind(-1), join=lambda x, y: torch.stack([x, y], -1),
            expand_dims=torch.unsqueeze, reshape=torch.reshape, permute=torch.permute,
            inline_asm_elementwise=_assemble, where=_where, maximum=_maximum, minimum=min,
            cdiv=lambda x, y: -(-x // y),
            max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2, log=lambda x: torch.log(torch.as_tensor(x)),
        )  # fmt: skip

    def _allocate(self, dtype: Any, shape: list[int], layout: Any) -> _Shared:
        if layout == "barrier":
            barriers = [_Barrier() for _ in range(shape[0])]
            self.barriers += barriers
            return _Shared(barriers)
        return _Shared(torch.full(shape, torch.nan if dtype.is_floating_point else POISON, dtype=dtype))

    def _specialize(self, functions_and_args: list, warps: list[int], registers: list[int]) -> None:
        roles = [threading.Thread(target=self._play, args=role, daemon=True) for role in functions_and_args]
        for role in roles:
            role.start()
        for role in roles:
            role.join()
        self._raise_failures()

    @torch.no_grad()  # each thread has to say so for itself
    def _play(self, function: Any, args: tuple) -> None:
        try:
            function(*args)
            if self._products():
                raise EmulationError("products of matrices were never waited for")
            if self._stores():
                raise EmulationError("copies out of shared memory were never waited for")
        except BaseException as failure:
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        with self.changed:
            self.failures.append(failure)
            self.changed.notify_all()

    def _init(self, barrier: _Shared, count: int) -> None:
        barrier.values.count = barrier.values.pending = count

    def _wait(self, barrier: _Shared, parity: int) -> None:
        time.sleep(self.rng.random() * PAUSE_SECONDS)
        b = barrier.values
        with self.changed:
            is_over = self.changed.wait_for(lambda: self.failures or b.phase & 1 != parity, HANG_SECONDS)
        if self.failures:
            raise EmulationError("another role failed")
        if not is_over:
            raise EmulationError(f"a barrier in phase {b.phase} was waited for with parity {parity} in vain")

    def _arrive(self, barrier: _Shared, count: int = 1) -> None:
        with self.changed:
            barrier.values.pending -= count
            barrier.values.complete_if_done()
            self.changed.notify_all()

    def _expect(self, barrier: _Shared, nbytes: int) -> None:
        with self.changed:
            barrier.values.bytes += nbytes
        self._arrive(barrier)

    def _copy(self, descriptor: _Descriptor, coordinates: list[int], barrier: _Shared, destination: _Shared) -> None:
        descriptor.copies += 1
        destination.values.fill_(torch.nan)
        delay = self.rng.random() * COPY_SECONDS

        @torch.no_grad()
        def copy() -> None:
            try:
                time.sleep(delay)
                destination.values.copy_(descriptor.read(coordinates))
                with self.changed:
                    barrier.values.bytes -= descriptor.block_type.nbytes
                    barrier.values.complete_if_done()
                    self.changed.notify_all()
            except BaseException as failure:
                self._fail(failure)

        self.copies.append(threading.Thread(target=copy, daemon=True))
        self.copies[-1].start()

    def _copy_out(self, descriptor: _Descriptor, coordinates: list[int], source: _Shared) -> None:
        self._stores().append((descriptor, coordinates, source.values, source.values.clone()))

    def _stores(self) -> list[tuple]:
        """The role's copies out of shared memory that it has not waited for."""
        if not hasattr(self.role, "stores"):
            self.role.stores = []
        return self.role.stores

    def _wait_for_stores(self, pendings: int) -> None:
        """Now they are made: as late as can be."""
        while len(self._stores()) > pendings:
            descriptor, coordinates, source, given = self._stores().pop(0)
            if not torch.equal(source.nan_to_num(nan=12345.0), given.nan_to_num(nan=12345.0)):
                raise EmulationError("shared memory changed while it was copied out")
            descriptor.write(coordinates, given)

    def _add(self, pointer: _Pointer, value: int, sem: str) -> int:
        with self.changed:
            before = pointer.memory[pointer.offset].item()
            pointer.memory[pointer.offset] = before + value
        return before

    def _products(self) -> list[_Product]:
        """Those that the role has issued and not waited for."""
        if not hasattr(self.role, "products"):
            self.role.products = []
        return self.role.products

    def _multiply(self, left, right: _Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False):
        product = _Product(left, right, acc if use_acc else None)
        self._products().append(product)
        return product if is_async else self._wait_for_products(0, [product])

    def _wait_for_products(self, num_outstanding: int, deps: list):
        products = self._products()
        if len(products) > num_outstanding:
            time.sleep(self.rng.random() * PRODUCT_SECONDS)
        while len(products) > num_outstanding:
            products.pop(0).finish()
        values = tuple(dep.value if isinstance(dep, _Product) else dep for dep in deps)
        if any(value is None for value in values):
            raise EmulationError("a product of matrices is used before it has been waited for")
        return values[0] if len(values) == 1 else values


def _static_assert(condition: bool, message: str) -> None:
    assert condition, message


def _load(pointer: _Pointer, mask: Tensor | None = None, other: float | None = None) -> Any:
    if isinstance(mask, Tensor):
        values = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
        _check_bounds(pointer.memory, pointer.offset[mask], "read")
        values[mask] = pointer.memory[pointer.offset[mask]]
        return values
    if not 0 <= pointer.offset < len(pointer.memory):
        raise EmulationError(f"element {pointer.offset} of {len(pointer.memory)} is read")
    return pointer.memory[pointer.offset].item()


def _check_bounds(memory: Tensor, at: Tensor, what: str) -> None:
    if at.numel() and (int(at.min()) < 0 or int(at.max()) >= len(memory)):
        raise EmulationError(f"elements {int(at.min())} to {int(at.max())} of {len(memory)} are {what}")


def _store(pointer: _Pointer, value: Any, mask: Any = True) -> None:
    value, mask, at = torch.broadcast_tensors(*map(torch.as_tensor, (value, mask, pointer.offset)))
    at = at[mask]
    _check_bounds(pointer.memory, at, "written")
    if not value.is_floating_point():
        value = value.to(pointer.memory.dtype)  # the widths of integers do not exist
    pointer.memory[at] = value[mask]


def _cast(x: Any, dtype: torch.dtype, bitcast: bool = False) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.view(dtype) if bitcast else x.to(dtype)


def _assemble(asm: str, constraints: str, args: list[Tensor], **options) -> Any:
    """The instructions that are known here."""
    if "vote.sync.any" in asm:  # in each of a warp's 16 rows, whether the number of any is not 0
        (rows,) = args
        return rows.view(-1, 16).any(1).to(rows.dtype).repeat_interleave(16)
    if "mov.b32 {" in asm:  # both halves
        (packed,) = args
        return packed.unsqueeze(-1).view(torch.int16).unbind(-1)
    if asm == "mov.b32 $0, $1;":
        return args[0]
    dtype = {"cvt.rn.bf16x2": torch.bfloat16, "cvt.rn.f16x2.": torch.float16}[asm[:13]]
    return torch.stack(args, -1).to(dtype).view(torch.int32).squeeze(-1)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def _maximum(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)
