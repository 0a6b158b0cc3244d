"""What models say of sampled tokens before they are trained on, packed as the trainer packs them, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from postlude.data.batch import PackedBatch, collate
from postlude.data.document import Document, Unit
from postlude.data.packing import best_fit
from postlude.training.precision import Precision
from postlude.training.program import Role
from postlude.training.step import language_head
from postlude.training.workers import Workers

Said = Callable[[PackedBatch, Tensor], Tensor]
"""From a batch and the rows of its sampled tokens to a value for each, [rows]."""


class Assessor:
    """Asks the models of a step about documents, of which each data rank takes its share: every rank calls it with
    the same documents, and gets what is said of all. ``block`` and ``micro`` are in tokens."""

    def __init__(
        self,
        roles: Mapping[str, Role],
        workers: Workers,
        precision: Precision,
        block: int,
        micro: int,
        temperature: float,
    ) -> None:
        self._roles, self._workers, self._precision = roles, workers, precision
        self._block, self._together, self._temperature = block, micro // block, temperature

    def log_probabilities(self, model: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """Of each document's sampled tokens at the temperature they were sampled with, float32 [sampled] each."""
        role = self._roles[model].model

        def said(batch: PackedBatch, rows: Tensor) -> Tensor:
            hidden = role.hidden(batch).index_select(0, rows - 1)
            return language_head(role).log_probabilities(hidden, batch.tokens[rows], self._temperature)[0]

        return self._ask(model, said, documents)

    def values(self, model: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """What a critic expects before each sampled token, float32 [sampled] each."""
        role = self._roles[model].model

        def said(batch: PackedBatch, rows: Tensor) -> Tensor:
            return role.head("scalar")(role.hidden(batch).index_select(0, rows - 1))

        return self._ask(model, said, documents)

    @torch.no_grad()
    def _ask(self, model: str, said: Said, documents: Sequence[Document]) -> list[np.ndarray]:
        role, device = self._roles[model].model, self._workers.device
        packs = best_fit([len(document) for document in documents], self._block)
        # Every rank runs as many batches as any other: sharded models are gathered by all at once.
        rounds = -(-len(packs) // (self._together * self._workers.data_world))
        found: dict[int, np.ndarray] = {}
        was_training = role.training
        role.eval()
        for turn in range(rounds):
            first = (turn * self._workers.data_world + self._workers.data_rank) * self._together
            places = [place for pack in packs[first : first + self._together] for place in pack]
            blocks = [tuple(Unit((documents[i],)) for i in pack) for pack in packs[first : first + self._together]]
            batch = collate(blocks).to(device)
            rows = batch.trained_rows()
            with self._precision.autocast(device):
                values = said(batch, rows).float().cpu().numpy()
            ends = torch.bincount(batch.document[rows], minlength=batch.documents).cumsum(0).tolist()
            for place, start, end in zip(places, [0, *ends][: len(ends)], ends, strict=True):
                found[place] = values[start:end]
        role.release()
        role.train(was_training)
        for theirs in self._workers.gather(found if self._workers.speaks else {}):
            found |= theirs
        return [found[place] for place in range(len(documents))]
