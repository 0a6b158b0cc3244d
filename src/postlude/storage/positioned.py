"""What readers of files have in common that know a size and a place in it."""

from __future__ import annotations

import io


class Positioned(io.RawIOBase):
    """A file to read from, of which ``size`` bytes are there and ``_at`` is where the next are read."""

    size: int
    _at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at
