"""What a recipe hands to the trainer: an objective, and the models that its step needs; and what it hands back.

Imports without torch: a controller has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from postlude.manifest.schema import ModelPlace
from postlude.objectives.objective import Objective
from postlude.training.optimizers import Optimizer

if TYPE_CHECKING:
    from postlude.model.language_model import LanguageModel
    from postlude.objectives.annotators import Annotator


@dataclass(frozen=True)
class Companion:
    """A model that a step needs beside the policy: a reference, a teacher, a critic.

    Without an optimiser it is frozen and only run forward.
    """

    start: ModelPlace
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class Annotation:
    """A frozen model that is run over the data once, before the first step, instead of in each: what the annotator
    makes of it comes as streams of the documents."""

    start: ModelPlace
    annotator: Annotator


@dataclass(frozen=True)
class Role:
    """A model in its place in the step."""

    model: LanguageModel
    optimizer: Optimizer | None
    """None: frozen."""


@dataclass(frozen=True)
class Program:
    """One training step, declared. The role ``policy`` is the model that the stage is about."""

    objective: Objective
    roles: Mapping[str, Role]


@dataclass
class Summary:
    """How a call to :meth:`postlude.training.trainer.Trainer.fit`, or the work of a stage, ended."""

    steps: int
    interrupted: bool = False
    first_loss: float | None = None
    last_loss: float | None = None
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    """Losses on held-out data by name, in the order they were measured during this call."""
