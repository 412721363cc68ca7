"""What can be wrong with a kernel, one exception each."""


class PtxError(Exception):
    """Any fault that the interpreter finds in a kernel; the message says where."""


class UnsupportedError(PtxError):
    """PTX that the interpreter does not know: nothing is guessed."""


class UnsupportedValueError(UnsupportedError):
    """Something that is not known and shows only when the kernel runs, as in the bits of a descriptor."""


class OutOfBoundsError(PtxError):
    """An address outside of every array, of the shared memory, or not aligned."""


class RaceError(PtxError):
    """An access to shared memory that nothing orders after an earlier one, or one to memory of a barrier."""


class UninitialisedError(PtxError):
    """Shared memory is read that nobody has written."""


class ProxyFenceError(PtxError):
    """The asynchronous proxy meets plain writes that no proxy fence, or no barrier fence, has made visible."""


class DescriptorError(PtxError):
    """An operand descriptor or a tensor copy that the hardware would not take, or would misread."""


class InFlightError(PtxError):
    """A register of a matrix product, or memory of a copy, is touched before the wait for it."""


class ArrivalError(PtxError):
    """More arrivals than a barrier expects, or different ideas of how many it expects."""


class DivergenceError(PtxError):
    """An instruction for all threads of a warp, or of a warpgroup, that only some execute, or each differently."""


class DeadlockError(PtxError):
    """Nothing can go on; the message lists what every warp waits for."""


class AllocationError(PtxError):
    """Tensor memory is allocated or freed in a way that the hardware would not take, or never freed."""
