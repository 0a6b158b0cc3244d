"""What an objective is: a function from one packed batch to a loss, blind to how the step is split.

A step is many micro-batches on many ranks. The trainer counts the normalisers over the whole step before the
first forward pass and adds up what the objective returns, so an objective divides sums by those counts and
the result is the same whatever the split.

This module imports without torch, so that a component, and an objective that only calls methods of tensors, can
stand in one file and still be named by the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from postlude.manifest.change import EVERY, Change, from_step
from postlude.manifest.component import Component

if TYPE_CHECKING:
    from torch import Tensor

    from postlude.data.batch import PackedBatch


class LanguageHead(Protocol):
    """The head ``lm``: never holds [rows, vocabulary]. ``hidden`` is [rows, hidden] throughout."""

    def negative_log_likelihood(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum (a scalar to differentiate) and the unweighted value of each row, [rows], detached.

        The weights must be known before the forward pass: the gradient is made during it. An objective whose
        ``loss_is_likelihood`` puts all factors, normalisers too, into the weights.
        """

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target [rows], and the entropy [rows] on request; differentiable in both."""

    def top_log_probabilities(self, hidden: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The likeliest tokens [rows, k], and their log-probabilities with that of the rest last [rows, k + 1]."""


class ScalarHead(Protocol):
    """The head ``scalar``: one number for each row."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows]."""


class Step(Protocol):
    """What an objective may ask of the trainer while one micro-batch is worked on."""

    batch: PackedBatch
    normalizers: Mapping[str, float]
    """Counts over the whole step: every micro-batch, every rank."""
    statistics: Mapping[str, float]
    """Sums over the whole step of what the objective's :meth:`Objective.measure` returned."""

    def hidden(self, model: str = "policy") -> Tensor:
        """Hidden states of a model at every token of the batch, [tokens, hidden]; computed once, then kept."""

    def head(self, name: str, model: str = "policy"):
        """A head of a model: :class:`LanguageHead` under ``lm``, :class:`ScalarHead` under ``scalar``."""

    def on(self, batch: PackedBatch) -> Step:
        """The same step on a batch that the objective makes of this one."""


@dataclass
class Outcome:
    """What an objective returns for one micro-batch."""

    loss: Tensor
    """Scalar to differentiate. Summed over micro-batches and ranks it is the loss of the step."""
    metrics: Mapping[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)
    """Numerator and denominator of each further metric, summed over the step before they are divided."""
    example_loss: Tensor | None = None
    """[documents] summed loss of each document, detached, for the per-example curves."""
    example_tokens: Tensor | None = None
    """[documents] how many tokens that sum runs over. A document with none has no row among the curves."""


class Objective(Protocol):
    """One loss. Built from its component in the manifest; holds no state. What are properties here may be plain
    attributes of the class. One that derives from this inherits what is said here of most."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams it reads beside the weight."""

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        """The heads it uses, by model: ``{"policy": ("lm",)}``."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """What :meth:`measure` returns, for a loss that couples the batch (a divergence, a load); mostly nothing."""
        return ()

    loss_is_likelihood: bool = False
    """Whether the loss is exactly what ``negative_log_likelihood`` or ``divergence`` returned. The head then adds its
    gradient to the weight's at once, and a step of many micro-batches never holds a second one of the size of the
    vocabulary. An objective that does not say so is taken not to be."""

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        """Its normalisers, counted on one micro-batch: trained tokens, documents, units, ..."""

    def measure(self, step: Step) -> Mapping[str, float]:
        """A pass without gradients before the step, called only where ``statistics`` names anything."""
        return {}

    def __call__(self, step: Step) -> Outcome: ...


class ObjectiveConfig(Component):
    """Base of the kind ``objectives``: the keys of a loss."""

    changes: ClassVar[Mapping[str, Change]] = {EVERY: from_step("the loss has it")}

    def build(self) -> Objective:
        """The objective."""
        raise NotImplementedError
