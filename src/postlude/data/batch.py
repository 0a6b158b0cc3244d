"""The packed batch: the one thing a trainer consumes, whatever the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from postlude.data.document import WEIGHT, Block, stream


@dataclass(frozen=True)
class PackedBatch:
    """Blocks laid end to end as one row of tokens. Attention and positions restart at each document.

    ``tokens`` and ``positions`` are [tokens] int64; ``lengths`` is [documents] int32 and sums to the number of
    tokens, padding included: padding is one last document without an example, of weight zero.
    """

    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    streams: dict[str, Tensor]
    """[tokens, *width] each; ``weight`` is always there."""
    document: Tensor
    """[tokens] int64: the index of each token's document."""
    unit: Tensor
    """[documents] int64: the index of each document's unit within this batch; -1 for padding."""
    place: Tensor
    """[documents] int64: the document's place in its unit (0 the chosen side of a pair, 1 the rejected)."""
    block: Tensor
    """[documents] int64: the index of each document's block within this batch; -1 for padding."""
    group: Tensor
    """[documents] int64, -1 for none."""
    trajectory: Tensor
    """[documents] int64, -1 for none."""
    example_ids: tuple[str, ...]
    """One for each document, padding excluded."""
    sources: tuple[str, ...]

    @property
    def documents(self) -> int:
        """How many documents there are, padding excluded."""
        return len(self.example_ids)

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    @property
    def weight(self) -> Tensor:
        return self.streams[WEIGHT.name]

    @property
    def real_tokens(self) -> int:
        """How many tokens there are, padding excluded."""
        return int(self.lengths[: self.documents].sum())

    def trained_rows(self) -> Tensor:
        """[trained] int64: the positions t of the tokens with a weight; each is predicted from row t - 1."""
        return self.weight.nonzero().squeeze(-1)

    def per_document(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Sum per-token ``values`` by document, [documents]. With ``rows``, ``values`` holds those positions only."""
        owner = self.document if rows is None else self.document[rows]
        return values.new_zeros(len(self.lengths)).index_add(0, owner, values)[: self.documents]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "positions", "lengths", "document", "unit", "place", "block", "group", "trajectory")
        }
        return replace(self, **moved, streams={k: v.to(device, non_blocking=True) for k, v in self.streams.items()})


def collate(blocks: Sequence[Block], streams: Iterable[str] = (), pad_to: int | None = None) -> PackedBatch:
    """Lay blocks end to end. ``streams`` names those to carry beside the weight; ``pad_to`` is a number of tokens.

    No blocks, or empty ones, give a batch of one untrained token: a rank without work still takes part in every
    collective. ValueError if the blocks hold more than ``pad_to`` tokens.
    """
    units = [unit for block in blocks for unit in block]
    documents = [document for unit in units for document in unit.documents]
    lengths = [len(document) for document in documents]
    total = sum(lengths)
    padding = (pad_to or max(total, 1)) - total
    if padding < 0:
        raise ValueError(f"The blocks hold {total} tokens, more than the {pad_to} to pad to.")
    spans = [*lengths, padding] if padding else lengths
    carried = {}
    for name in (WEIGHT.name, *(name for name in streams if name != WEIGHT.name)):
        kind = stream(name)
        row = np.full((total + padding, *kind.width), kind.fill, kind.dtype)
        start = 0
        for document, length in zip(documents, lengths, strict=True):
            if name in document.streams:
                row[start : start + length] = document.streams[name]
            if name == WEIGHT.name:
                row[start] = 0
            start += length
        carried[name] = torch.from_numpy(row)
    per_document = np.array(spans, dtype=np.int32)
    return PackedBatch(
        tokens=torch.from_numpy(_concatenate([d.tokens for d in documents], padding)),
        positions=torch.from_numpy(_concatenate([np.arange(n) for n in spans], 0)),
        lengths=torch.from_numpy(per_document),
        streams=carried,
        document=torch.from_numpy(np.repeat(np.arange(len(spans)), per_document)),
        unit=_of_documents([i for i, unit in enumerate(units) for _ in unit.documents], padding),
        place=_of_documents([i for unit in units for i in range(len(unit.documents))], padding),
        block=_of_documents([i for i, block in enumerate(blocks) for unit in block for _ in unit.documents], padding),
        group=_of_documents([document.group for document in documents], padding),
        trajectory=_of_documents([document.trajectory for document in documents], padding),
        example_ids=tuple(document.example_id for document in documents),
        sources=tuple(document.source for document in documents),
    )


def _concatenate(parts: list[np.ndarray], padding: int) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(padding, np.int64)]).astype(np.int64, copy=False)


def _of_documents(values: list[int], padding: int) -> Tensor:
    return torch.tensor([*values, -1] if padding else values, dtype=torch.int64)
