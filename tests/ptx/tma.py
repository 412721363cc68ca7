"""The copy engine: boxes of tensors, or lines, in global memory to and from shared memory, whenever it likes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import DescriptorError
from ptx.memory import SHARED_BASE, Space

if TYPE_CHECKING:
    from ptx.barriers import MBarrier
    from ptx.warp import Warp


def swizzle(addresses: np.ndarray, span: int) -> Any:
    """Addresses in shared memory: 16-byte pieces of rows of ``span`` bytes (0, 32, 64 or 128) are permuted."""
    pieces = max(span // 16, 1)
    return addresses ^ ((addresses >> 7 & (pieces - 1)) << 4)


@dataclass(frozen=True)
class TensorMap:
    """A tensor of elements of ``size`` bytes; that of stride 1 comes first. ``strides`` are bytes, of the others.

    Raises:
        DescriptorError: a value that the hardware, or this interpreter, does not take.
    """

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    span: int
    element_strides: tuple[int, ...] = ()
    size: int = 2

    def __post_init__(self) -> None:
        steps = self.element_strides or (1,) * len(self.dims)
        object.__setattr__(self, "element_strides", steps)
        ranks = {len(self.dims), len(self.strides) + 1, len(self.box), len(steps)}
        if len(ranks) > 1 or any(stride % 16 for stride in self.strides) or self.address % 16:
            raise DescriptorError(f"{self}: ranks, or no multiple of 16 bytes")
        if max(self.box) > 256 or min(*self.box, *self.dims, *steps) < 1 or max(steps) > 8 or steps[0] > 1:
            raise DescriptorError(f"{self}: sides of 1 to 256, steps of 1 to 8, in the first dimension of 1")
        if self.span and self.size * self.sides[0] != self.span:
            raise DescriptorError(f"{self}: rows of a box must be as long as the swizzle's")
        if self.size * self.box[0] % 16:
            raise DescriptorError(f"{self}: rows of a box must be multiples of 16 bytes")

    @property
    def sides(self) -> tuple[int, ...]:
        """Elements of a box that are copied per dimension."""
        return tuple(-(-side // step) for side, step in zip(self.box, self.element_strides, strict=True))

    def elements(self, coordinates: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of a box's elements, in the order of shared memory, and which of them are inside the tensor."""
        address, inside = np.array(self.address, np.int64), np.array(True)
        for i, (start, side, step) in enumerate(zip(coordinates, self.sides, self.element_strides, strict=True)):
            place = (start + np.arange(side, dtype=np.int64) * step).reshape((side,) + (1,) * i)
            address = address + place * (self.size if i == 0 else self.strides[i - 1])
            inside = inside & ((place >= 0) & (place < self.dims[i]))
        return address.reshape(-1), inside.reshape(-1)


@dataclass(frozen=True)
class Line:
    """``bytes`` bytes side by side in global memory: what a bulk copy without a tensor map copies.

    Raises:
        DescriptorError: not multiples of 16 bytes.
    """

    address: int
    bytes: int
    span: int = 0
    size: int = 4

    def __post_init__(self) -> None:
        if self.address % 16 or self.bytes % 16 or self.bytes <= 0:
            raise DescriptorError(f"{self}: an address, or bytes, that are no multiple of 16")

    def elements(self, coordinates: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """As those of a tensor: addresses, all of them inside."""
        addresses = self.address + np.arange(0, self.bytes, self.size, dtype=np.int64)
        return addresses, np.ones(len(addresses), np.bool_)


@functools.lru_cache(maxsize=1 << 10)
def shared_places(address: int, count: int, size: int, span: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses in shared memory of elements that are copied, and indices of the words that hold them."""
    places = swizzle(address + size * np.arange(count, dtype=np.int64), span)
    return places, np.unique((places - SHARED_BASE) // 4)


class Copy:
    """One copy under way. :meth:`advance` does its next part; ``read`` and ``finished`` say what is done."""

    def __init__(self, warp: Warp, tensor: TensorMap | Line, coordinates: Sequence[int], address: int) -> None:
        self.shared, self.memory = warp.block.shared, warp.block.machine.memory
        self.addresses, self.inside = tensor.elements(coordinates)
        if address % (128 if isinstance(tensor, TensorMap) else 16):
            raise DescriptorError(f"a copy to or from {address:#x}, which is not aligned")
        self.size, self.type = tensor.size, {1: np.uint8, 2: np.uint16, 4: np.uint32}[tensor.size]
        places, self.words = shared_places(address, len(self.addresses), self.size, tensor.span)
        self.places = self.shared.region.elements(places, self.size)
        self.read = self.finished = False

    def advance(self) -> None:
        raise NotImplementedError

    def _outside(self, space: Space) -> tuple[np.ndarray, np.ndarray]:
        inside = self.addresses[self.inside]
        if not len(inside):
            return np.zeros(0, self.type), np.zeros(0, np.int64)
        return space.place(inside, self.size)


class Load(Copy):
    """To shared memory; a barrier counts the bytes."""

    def __init__(
        self, warp: Warp, tensor: TensorMap | Line, coordinates: Sequence[int], address: int, barrier: MBarrier
    ) -> None:
        super().__init__(warp, tensor, coordinates, address)
        self.barrier = barrier
        self.shared.begin_async_write(warp, self.words, barrier, "load")

    def advance(self) -> None:
        data = np.zeros(len(self.places), self.type)
        source, index = self._outside(self.memory)
        data[self.inside] = source[index]
        self.shared.region.view(self.size)[self.places] = data
        self.shared.end_async_write(self.words, self.barrier)
        self.barrier.complete(self.size * len(data))
        self.read = self.finished = True


class Store(Copy):
    """From shared memory: reads it some time, and writes what is inside of the tensor later."""

    def __init__(self, warp: Warp, tensor: TensorMap | Line, coordinates: Sequence[int], address: int) -> None:
        super().__init__(warp, tensor, coordinates, address)
        self.reading = self.shared.begin_async_read(warp, self.words, "store")
        self._data = np.zeros(0, self.type)

    def advance(self) -> None:
        if not self.read:
            self._data = self.shared.region.view(self.size)[self.places]
            self.read = True
            return
        self._write(*self._outside(self.memory))
        self.finished = True

    def _write(self, target: np.ndarray, index: np.ndarray) -> None:
        target[index] = self._data[self.inside]


class Reduction(Store):
    """A store of 32-bit floats that adds them to what is there; it cannot begin below 0, as an H100 showed."""

    def __init__(self, warp: Warp, tensor: TensorMap, coordinates: Sequence[int], address: int) -> None:
        if tensor.size != 4:
            raise DescriptorError(f"{tensor}: only float32 is added")
        if min(coordinates) < 0:
            raise DescriptorError(f"a reduction at {tuple(coordinates)}: an illegal instruction")
        super().__init__(warp, tensor, coordinates, address)

    def _write(self, target: np.ndarray, index: np.ndarray) -> None:
        np.add.at(target.view(np.float32), index, self._data[self.inside].view(np.float32))


class StoreGroups:
    """The bulk groups of one thread."""

    def __init__(self) -> None:
        self.open: list[Store] = []
        self.groups: list[list[Store]] = []
        self._unread: list[Store] = []
        self._waited = 0

    def add(self, store: Store) -> None:
        self.open.append(store)
        self._unread.append(store)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def complete(self, allowed: int, only_read: bool) -> bool:
        """Whether all groups but the last ``allowed`` ones have read, or written, everything."""
        old = self.groups[: len(self.groups) - allowed]
        return all(store.read if only_read else store.finished for group in old for store in group)

    def observe(self, warp: Warp, allowed: int, only_read: bool) -> None:
        """The thread has waited: memory that these groups read may be written again."""
        if not only_read:
            self._waited = max(self._waited, len(self.groups) - allowed)
        old = [store for group in self.groups[: len(self.groups) - allowed] for store in group]
        for store in [store for store in self._unread if any(store is other for other in old)]:
            self._unread.remove(store)
            store.shared.end_async_reads(warp, [store.reading])

    @property
    def unfinished(self) -> bool:
        """Whether there are copies of which the thread does not know that they are done."""
        return bool(self.open) or self._waited < len(self.groups)

    @property
    def unread(self) -> int:
        """Copies that nobody has waited for."""
        return len(self._unread)
