"""Canaries: tensors inside larger buffers of poison, and allocations that come poisoned.

Poison is a NaN with a bit pattern of its own, so that what reads it cannot stay finite and what writes over it is
noticed, NaN or not. Integers have no NaN: theirs is a value far out of any range.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

MARGIN = 256  # elements in front and behind: a row's worth or more, and a multiple of every alignment
POISON = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FC0_5A5A),
    torch.float64: (torch.int64, 0x7FF8_5A5A_5A5A_5A5A),
    torch.int32: (torch.int32, 0x3A5A_5A5A),
    torch.int64: (torch.int64, 0x3A5A_5A5A_5A5A_5A5A),
    torch.uint8: (torch.uint8, 0x5A),
    torch.bool: (torch.uint8, 1),
}

_empty_like = torch.empty_like


class CanaryError(AssertionError):
    """Memory that nobody may write was written."""


@dataclass
class _Guarded:
    name: str
    bits: Tensor  # the whole buffer, as integers
    expected_bits: Tensor
    may_change: Tensor | None  # None: nothing may


@dataclass
class Canaries:
    """Allocates tensors amid poison, and finds out later whether anything was written that must not be."""

    _guarded: list[_Guarded] = field(default_factory=list)

    def place(self, values: Tensor, strides: Sequence[int] | None = None, name: str = "tensor") -> Tensor:
        """A copy of `values` for an op to read, contiguous unless `strides` are given: nothing of it may change."""
        buffer, t = _embed(values.shape, strides or contiguous_strides(values.shape), values.dtype, values.device)
        t.copy_(values)
        self.watch(name, buffer)
        return t

    def empty(self, shape, strides, dtype: torch.dtype, device: torch.device, name: str = "tensor") -> Tensor:
        """A tensor full of poison for an op to write: everything around it and between its rows must stay."""
        buffer, t = _embed(shape, strides, dtype, device)
        may_change = torch.zeros(buffer.shape, dtype=torch.bool, device=device)
        may_change.as_strided(t.shape, t.stride(), MARGIN).fill_(True)
        self.watch(name, buffer, may_change)
        return t

    def watch(self, name: str, buffer: Tensor, may_change: Tensor | None = None) -> None:
        bits = buffer.view(POISON[buffer.dtype][0])
        self._guarded.append(_Guarded(name, bits, bits.clone(), may_change))

    def check(self) -> None:
        """Raises CanaryError with the name of the tensor, and where the write was."""
        for guarded in self._guarded:
            is_written = guarded.bits != guarded.expected_bits
            if guarded.may_change is not None:
                is_written &= ~guarded.may_change
            written = is_written.flatten().nonzero().flatten()
            if len(written):
                raise CanaryError(
                    f"{guarded.name}: {len(written)} elements of its buffer of {is_written.numel()} were written that "
                    f"must not be, the first at {int(written[0])} (the tensor begins at {MARGIN})"
                )


def poison_(t: Tensor) -> Tensor:
    """Fills a tensor with its dtype's poison."""
    int_dtype, pattern = POISON[t.dtype]
    t.view(int_dtype).fill_(pattern)
    return t


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


@contextlib.contextmanager
def poisoned_allocations(canaries: Canaries) -> Iterator[list[Tensor]]:
    """Inside, torch.empty and its kin return guarded memory full of poison; yields the list of what they returned."""
    allocated: list[Tensor] = []

    def empty_strided(size, stride, *, dtype=None, device=None):
        dtype, device = dtype or torch.get_default_dtype(), torch.device(device or torch.get_default_device())
        allocated.append(canaries.empty(size, stride, dtype, device, f"allocation {len(allocated)}"))
        return allocated[-1]

    def empty(*size, dtype=None, device=None):
        shape = tuple(size) if all(isinstance(n, int) for n in size) else tuple(*size)
        return empty_strided(shape, contiguous_strides(shape), dtype=dtype, device=device)

    def empty_like(t, *, dtype=None, device=None, memory_format=torch.preserve_format):
        strides = _empty_like(t, memory_format=memory_format, device="meta").stride()
        return empty_strided(t.shape, strides, dtype=dtype or t.dtype, device=device or t.device)

    def new_empty(t, *size, dtype=None, device=None):
        return empty(*size, dtype=dtype or t.dtype, device=device or t.device)

    def new_empty_strided(t, size, stride, *, dtype=None, device=None):
        return empty_strided(size, stride, dtype=dtype or t.dtype, device=device or t.device)

    with (
        mock.patch.multiple(torch, empty=empty, empty_like=empty_like, empty_strided=empty_strided),
        mock.patch.multiple(Tensor, new_empty=new_empty, new_empty_strided=new_empty_strided),
    ):
        yield allocated


def _embed(shape, strides, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    extent = 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    buffer = poison_(torch.zeros(extent + 2 * MARGIN, dtype=dtype, device=device))
    return buffer, buffer.as_strided(tuple(shape), tuple(strides), MARGIN)
