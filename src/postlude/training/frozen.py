"""Frozen models over packed documents: what they make of each document, packed as the trainer packs, without gradients.

One loop, :func:`over_packs`, serves the reference and the critic of a step (:class:`Assessor`), the likelihoods of
evaluations, reward models, and the pass before the first step (:class:`FrozenModel`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from postlude.data.annotations import Values
from postlude.data.batch import PackedBatch, collate
from postlude.data.document import Document, Unit
from postlude.data.packing import best_fit
from postlude.model.language_model import LanguageModel
from postlude.objectives.annotators import Annotator
from postlude.training.precision import Precision
from postlude.training.program import Role
from postlude.training.step import language_head
from postlude.training.workers import Workers

Result = TypeVar("Result")
Pack = Sequence[int]
"""The places of documents that are packed together."""


def batches_of(documents: Sequence[Document], block: int, together: int = 1) -> list[Sequence[Pack]]:
    """What goes through a model in one batch: ``together`` packs of at most ``block`` tokens, or of one longer
    document."""
    packs = best_fit([len(document) for document in documents], max([block, *map(len, documents)]))
    return [packs[first : first + together] for first in range(0, len(packs), together)]


@torch.no_grad()
def over_packs(
    documents: Sequence[Document],
    batches: Sequence[Sequence[Pack]],
    compute: Callable[[PackedBatch], Sequence[Result]],
    device: torch.device,
    pad_to: int | None = None,
) -> dict[int, Result]:
    """What ``compute`` makes of the documents in these batches, by their places. It gets a batch on ``device``, padded
    to ``pad_to`` tokens, and returns a result for each of its documents."""
    results: dict[int, Result] = {}
    for packs in batches:
        blocks = [tuple(Unit((documents[place],)) for place in pack) for pack in packs]
        batch = collate(blocks, pad_to=pad_to).to(device)
        results.update(zip([place for pack in packs for place in pack], compute(batch), strict=True))
    return results


def by_document(batch: PackedBatch, rows: Tensor, values: np.ndarray) -> list[np.ndarray]:
    """What [rows, ...] holds for the rows of each document."""
    ends = torch.bincount(batch.document[rows], minlength=batch.documents).cumsum(0).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends)]


# --- the models of a step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assessor:
    """Asks the models of a step about documents, of which each data rank takes its share: every rank calls it with
    the same documents, and gets the values for all. ``block`` and ``micro`` are in tokens."""

    roles: Mapping[str, Role]
    workers: Workers
    precision: Precision
    block: int
    micro: int
    temperature: float

    def log_probabilities(self, model: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """Of each document's sampled tokens at the temperature they were sampled with, float32 [sampled] each."""

        def compute(role: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
            return language_head(role).log_probabilities(hidden, targets, self.temperature)[0]

        return self._values(model, compute, documents)

    def likelihoods(self, model: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """The same, and the entropy of the distribution that each is of, float32 [sampled, 2] each."""

        def compute(role: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
            logp, entropy = language_head(role).log_probabilities(hidden, targets, self.temperature, entropy=True)
            assert entropy is not None
            return torch.stack([logp, entropy], 1)

        return self._values(model, compute, documents)

    def values(self, model: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """What a critic expects before each sampled token, float32 [sampled] each."""
        return self._values(model, lambda role, hidden, targets: role.head("scalar")(hidden), documents)

    def _values(
        self, name: str, of_rows: Callable[[LanguageModel, Tensor, Tensor], Tensor], documents: Sequence[Document]
    ) -> list[np.ndarray]:
        """``of_rows`` of a model, the hidden states before the sampled tokens, and these tokens, for each document."""
        model, workers = self.roles[name].model, self.workers
        batches = batches_of(documents, self.block, self.micro // self.block)
        # Every rank runs as many batches as any other: sharded models are gathered by all at once.
        batches += [[]] * (-len(batches) % workers.data_world)

        def compute(batch: PackedBatch) -> list[np.ndarray]:
            rows = batch.trained_rows()
            with self.precision.autocast(workers.device):
                before = model.hidden(batch).index_select(0, rows - 1)
                values = of_rows(model, before, batch.tokens[rows]).float().cpu().numpy()
            return by_document(batch, rows, values)

        was_training = model.training
        model.eval()
        own = over_packs(documents, batches[workers.data_rank :: workers.data_world], compute, workers.device)
        model.release()
        model.train(was_training)
        results: dict[int, np.ndarray] = {}
        for part in workers.gather(own if workers.speaks else {}):
            results |= part
        return [results[place] for place in range(len(documents))]


# --- the pass before the first step -------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenModel:
    """A model that an annotator asks on this rank's device, in batches of the size of the trainer's.

    ``policy_vocabulary`` is how many tokens the policy has, ``block`` and ``micro`` are in tokens; with ``pads`` every
    batch is as long as any other, for a compiled model.
    """

    model: LanguageModel
    annotator: Annotator
    policy_vocabulary: int
    device: torch.device
    precision: Precision
    block: int
    micro: int
    pads: bool

    def values(self, documents: Sequence[Document]) -> list[Values]:
        """What it has to say of each document."""
        tokens = self.annotator.vocabulary(self.model.vocabulary, self.policy_vocabulary)
        head = language_head(self.model, vocabulary=tokens)

        def compute(batch: PackedBatch) -> list[Values]:
            rows = batch.trained_rows()
            with self.precision.autocast(self.device):
                before = self.model.hidden(batch).index_select(0, rows - 1)
                streams = [values.cpu().numpy() for values in self.annotator(head, before, batch.tokens[rows])]
            parts = zip(*(by_document(batch, rows, values) for values in streams), strict=True)
            return [dict(zip(self.annotator.streams, part, strict=True)) for part in parts]

        batches = batches_of(documents, self.block, self.micro // self.block)
        results = over_packs(documents, batches, compute, self.device, self.micro if self.pads else None)
        return [results[place] for place in range(len(documents))]


# --- likelihoods --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentLikelihood:
    """How likely the trained tokens of a document are."""

    log_probability: float
    """Weighted and summed over its tokens."""
    weight: float
    """The sum of the weights: the number of tokens where each has the weight 1."""
    tokens: int
    """How many tokens have a weight."""


def likelihoods(model: LanguageModel, documents: Sequence[Document], block: int) -> list[DocumentLikelihood]:
    """The likelihood of each document, ``block`` tokens at a time."""
    head = language_head(model)

    def compute(batch: PackedBatch) -> list[DocumentLikelihood]:
        rows = batch.trained_rows()
        weights = batch.weight[rows]
        _, losses = head.negative_log_likelihood(model.hidden(batch)[rows - 1], batch.tokens[rows], weights)
        columns = (
            batch.per_document(losses.double() * weights, rows),
            batch.per_document(batch.weight.double()),
            batch.per_document((batch.weight > 0).double()),
        )
        measured = zip(*(column.tolist() for column in columns), strict=True)
        return [DocumentLikelihood(-loss, weight, int(tokens)) for loss, weight, tokens in measured]

    results = over_packs(documents, batches_of(documents, block), compute, model.device)
    return [results[place] for place in range(len(documents))]
