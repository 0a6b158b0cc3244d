"""Between pyarrow and numpy without pandas. ``Array.to_numpy``, ``pyarrow.array`` and ``pyarrow.scalar`` import pandas
wherever it is installed, which is 35 MiB for a server that never uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow


def numbers(column: pyarrow.Array | pyarrow.ChunkedArray) -> np.ndarray:
    """The numbers of a column, those of a part not copied; truth is 1, and anything may stand where there is none."""
    import pyarrow as pa

    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.from_dlpack(pa.Array.from_buffers(chunk.type, len(chunk), [None, chunk.buffers()[1]], offset=chunk.offset))
        for chunk in chunks
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, parts[0].dtype if parts else np.int64), *parts])


def text_scalar(content: str) -> pyarrow.Scalar:
    """A text to compare a column with."""
    import pyarrow as pa

    encoded = content.encode()
    ends = np.array([0, len(encoded)], np.int32)
    return pa.StringArray.from_buffers(1, pa.py_buffer(ends), pa.py_buffer(encoded))[0]


def joined_texts(column: pyarrow.StringArray) -> memoryview:
    """All texts of a column, one after another, as UTF-8, where they stand."""
    _, ends, content = column.buffers()
    if content is None:
        return memoryview(b"")
    first, last = np.frombuffer(ends, np.int32)[[column.offset, column.offset + len(column)]].tolist()
    return memoryview(content)[first:last]
