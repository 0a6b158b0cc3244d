"""Readers of what one view shows alone: losses by example, rollouts, readings. They read while somebody looks, one
thread at a time for all tabs, and go on where they were."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from postlude.dashboard.followed import Followed
from postlude.dashboard.memory import given_back
from postlude.errors import UserError
from postlude.runs import Stage

LOOK_SECONDS = 2.0
"""Between two looks at what came."""


class Reads(Protocol):
    @property
    def damages(self) -> Sequence[str]: ...

    def update(self) -> bool: ...


R = TypeVar("R", bound=Reads)
T = TypeVar("T")


class Kept(Generic[R]):
    """A reader, and what is wrong with what it reads."""

    def __init__(self, reader: R) -> None:
        self._reader, self._lock = reader, threading.Lock()
        self._looked_at = -LOOK_SECONDS
        self.trouble: str | None = None

    def look(self, show: Callable[[R], T], again: bool = True) -> T | None:
        """What is shown of the reader, once it has read what came; None where nothing did and it need not be shown
        ``again``, and where it cannot be shown: then :attr:`trouble` says why."""
        with self._lock, given_back():
            changed = again
            if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                try:
                    changed |= self._reader.update()
                    self.trouble = "\n".join(self._reader.damages[:3]) or None
                except (UserError, OSError) as error:
                    changed |= self.trouble != str(error)
                    self.trouble = str(error)
                self._looked_at = time.monotonic()
            try:
                return show(self._reader) if changed else None
            except (UserError, OSError) as error:  # what was there is gone: a stage that goes back writes it anew
                self.trouble = str(error)
                return None


_readers: WeakKeyDictionary[Followed, dict[tuple[str, type], Kept[Any]]] = WeakKeyDictionary()
_making = threading.Lock()


def kept(followed: Followed, stage: str, kind: Callable[[Stage], R]) -> Kept[R]:
    """That of a stage, which is made by ``kind`` where there is none yet."""
    with _making:
        own = _readers.setdefault(followed, {})
        key: Any = (stage, kind)
        if key not in own:
            own[key] = Kept(kind(followed.run.stage(stage)))
        return own[key]
