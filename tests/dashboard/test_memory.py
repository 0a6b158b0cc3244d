"""What was freed goes back to the system."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from postlude.dashboard import memory


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@contextmanager
def freed_in_pieces() -> Iterator[None]:
    """64 MiB that were freed, below something that stays."""
    blocks = [bytes(2**12) for _ in range(2**14)]
    kept = blocks[-1]
    del blocks
    yield
    del kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library can")
def test_memory_goes_back_after_what_took_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LONG_SECONDS", 0.0)
    with freed_in_pieces():
        before = resident()
        with memory.given_back():
            pass
        assert before - resident() > 2**25
