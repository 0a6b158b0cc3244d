"""Memory of the server: reading a long run leaves much of it with the allocators, in pieces, which is given back."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

LONG_SECONDS = 0.5
"""What takes less has not read much."""


def use_one_allocator() -> None:
    """Have pyarrow, which is not imported yet, take memory where all else does: what one frees the other can use."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


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
