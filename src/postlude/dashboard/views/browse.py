"""What views have in common in which one page of many rows is read by what the address says."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar

from postlude.dashboard import frame
from postlude.dashboard.kept import Kept, Reads

R = TypeVar("R", bound=Reads)
T = TypeVar("T")


class Browse(Generic[R, T]):
    """A view of a reader: what it reads for an address, and how it shows that."""

    def __init__(self, kept: Kept[R], view: dict[str, str]) -> None:
        self.kept, self.view, self.is_first = kept, view, True
        self.trouble = frame.warn("")

    def _read(self, reader: R, view: dict[str, str]) -> T:
        """What is to be shown; in a thread."""
        raise NotImplementedError

    def _show(self, told: T) -> None:
        raise NotImplementedError

    async def refresh(self) -> None:
        """Show what came."""
        again, self.is_first = self.is_first, False
        view = dict(self.view)
        told = await asyncio.to_thread(self.kept.look, lambda reader: self._read(reader, view), again)
        self.trouble.set_text(self.kept.trouble or "")
        self.trouble.set_visibility(self.kept.trouble is not None)
        if told is not None:
            self._show(told)

    async def _set(self, **changes: Any) -> None:
        """Other keys of the address, from the first page on."""
        if any((value or None) != self.view.get(key) for key, value in changes.items()):
            frame.remember(self.view, page=None, **changes)
            self.is_first = True
            await self.refresh()

    async def _turn(self, by: int) -> None:
        frame.remember(self.view, page=max((frame.number(self.view, "page") or 0) + by, 0) or None)
        self.is_first = True
        await self.refresh()
