"""Documents with per-token streams: the one form that all training data take.

A stream's value at position t belongs to token t, the one that the model predicts from position t - 1. The
first token of a document is predicted from nothing, so its weight is always zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Stream:
    """A named per-token quantity: what a packed batch carries beside the token ids."""

    name: str
    dtype: np.dtype
    fill: float = 0.0
    """The value at padding and in documents that do not carry the stream."""
    width: tuple[int, ...] = ()
    """Dimensions of one token's value: () for a scalar, (k,) for a vector."""


_streams: dict[str, Stream] = {}


def define_stream(name: str, dtype: str, fill: float = 0.0, width: tuple[int, ...] = ()) -> Stream:
    """Name a stream once for the whole program. ValueError if the name stands for something else already."""
    stream = Stream(name, np.dtype(dtype), fill, width)
    if _streams.setdefault(name, stream) != stream:
        raise ValueError(f"The stream '{name}' is defined already, as {_streams[name]}.")
    return stream


def stream(name: str) -> Stream:
    """The stream defined under a name. KeyError if there is none."""
    return _streams[name]


WEIGHT = define_stream("weight", "float32")
"""How much a token counts in the loss: zero where it is not trained, never negative."""

SCORE = define_stream("score", "float32")
"""What the data say of a document, the same at each of its tokens: how good an answer is, or 1 for one that is wanted
and -1 for one that is not."""

REFERENCE_LOGP = define_stream("reference_logp", "float32")
"""The log-probability of a trained token under a frozen reference model."""


@dataclass(frozen=True)
class Document:
    """One sequence whose tokens attend to each other and to nothing else."""

    example_id: str
    """Stable from the record to the per-example loss: the source's name, a colon, and a key or content hash."""
    source: str
    tokens: np.ndarray
    """[tokens] int64."""
    streams: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Arrays [tokens, *width], one for each stream that the document carries."""
    group: int = -1
    """Shared by the samples of one prompt; may span blocks."""
    trajectory: int = -1
    """Shared by the turns of one episode; may span blocks."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or not len(self.tokens):
            raise ValueError(
                f"{self.example_id}: a document is a row of at least one token, not an array {self.tokens.shape}."
            )
        for name, values in self.streams.items():
            expected = (len(self.tokens), *stream(name).width)
            if values.shape != expected:
                raise ValueError(
                    f"{self.example_id}: the stream '{name}' must be an array {expected}, not {values.shape}."
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> np.ndarray:
        """[tokens] bool: which tokens count in the loss. The first never does."""
        weight = self.streams.get(WEIGHT.name)
        trained = np.zeros(len(self.tokens), dtype=bool) if weight is None else weight > 0
        trained[0] = False
        return trained

    @property
    def trained_tokens(self) -> int:
        """How many tokens count in the loss."""
        return int(np.count_nonzero(self.trained))


@dataclass(frozen=True)
class Unit:
    """Documents that belong together (one conversation, the two sides of a pair): never parted by filtering,
    truncation, packing or dealing to ranks. A document's place in the unit says what it is."""

    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return sum(len(document) for document in self.documents)


Block = tuple[Unit, ...]
"""What packing makes: units whose tokens together fit into the block size."""
