"""What training raises for a user's mistake or a run that went wrong: one sentence each."""

from __future__ import annotations

# torch has no class of its own for these: the CPU's allocator, sizes beyond 64 bits, Apple's GPU.
_NO_MEMORY = ("DefaultCPUAllocator", "allocate memory", "Storage size calculation overflowed", "out of memory")


class TrainingError(RuntimeError):
    """A run cannot start, continue or finish; the message says why and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch on the CPU or a GPU ran out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _NO_MEMORY)
    )
