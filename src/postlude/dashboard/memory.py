"""Memory of the server: reading a long run leaves much of it with the allocators, in pieces, which is given back."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

LONG_SECONDS = 0.5
"""What takes less has not read much."""


_ARENAS, _MAPPED_BYTES, _TRIM_BYTES = (-8, 2), (-3, 2**18), (-1, 2**20)
"""Of GNU's ``mallopt``: heaps for all threads together; from which size a block is mapped alone, and goes back as soon
as it is freed, instead of a size that grows to 32 MiB with what was freed; what may stay free at the end of a heap."""


def spare() -> None:
    """Have this process keep little of what it frees. pyarrow, which is not imported yet, shall take memory where all
    else does, so that what one frees the other can use."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter, value in (_ARENAS, _MAPPED_BYTES, _TRIM_BYTES):
            mallopt(parameter, value)


@contextmanager
def given_back() -> Iterator[None]:
    """Give what is free back to the system after a block that took long, where the C library can (GNU's)."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None and time.perf_counter() - begun > LONG_SECONDS:
            trim(0)
