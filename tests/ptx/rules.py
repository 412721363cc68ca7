"""Rules of the PTX ISA that kernels which work on hardware are known to break. Ours must keep them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What a machine asks of its kernel.

    Attributes:
        barrier_fences: ``fence.mbarrier_init`` between making a barrier and a copy that uses it.
        overwrite_fences: a proxy fence between plain writes and a copy that overwrites them.
        tensor_fences: ``tcgen05.fence`` on both sides of what orders accesses to tensor memory.
        equal_writes: an order between plain writes of the same value to the same place.
        load_waits: ``tcgen05.wait::ld`` before registers that are loaded from tensor memory are read.
        store_waits: ``tcgen05.wait::st`` before others are told of a store to tensor memory.
        same_shape_only: products of tensor memory rely on no other order than that of products with the same
            accumulator and shape, which is all that is promised. Neither our kernel nor CUTLASS's keep this one.
    """

    barrier_fences: bool = True
    overwrite_fences: bool = True
    tensor_fences: bool = True
    equal_writes: bool = True
    load_waits: bool = True
    store_waits: bool = True
    same_shape_only: bool = False
