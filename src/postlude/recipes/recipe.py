"""What a recipe says: the keys of a stage, and what follows from them for whatever works on it.

A recipe is a component: its fields are the stage's keys. One that trains names the shapes of data it takes, the units
it makes of an encoded example, the objective, and the other models that the step needs, or that are run over the data
before the first one; everything else is the trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from postlude.data.example import Conversation, Text, Tokens
from postlude.manifest.change import EVERY, Change, never
from postlude.manifest.component import Name, Positive
from postlude.manifest.schema import NamesDatasets, StageConfig, TrainingStage
from postlude.objectives.objective import Objective
from postlude.training.program import Annotation, Companion

if TYPE_CHECKING:
    from postlude.data.document import Document, Unit

Datasets = Annotated[dict[str, Annotated[float, Field(ge=1, le=1)]], Field(min_length=1), NamesDatasets()]
"""Data sets by name, each with the weight 1: all of its records are used, once."""


class TrainingRecipe(TrainingStage):
    """Base of the kind ``recipes`` for stages that train a model."""

    does: ClassVar[str] = "postlude.stages.training:Training"
    half: ClassVar[str] = "fp16"
    """What ``precision: auto`` computes in on CUDA where the checkpoint does not say bf16."""

    @property
    def accepts(self) -> tuple[type, ...]:
        """The shapes of examples, as a format's ``produces`` names them, that the recipe can train on."""
        return (Conversation, Text, Tokens)

    def units(self, documents: Sequence[Document]) -> tuple[Unit, ...]:
        """Which of an example's documents belong together. By default each stands alone."""
        from postlude.data.document import Unit

        return tuple(Unit((document,)) for document in documents)

    def objective(self) -> Objective:
        """The loss."""
        raise NotImplementedError

    def companions(self) -> Mapping[str, Companion]:
        """Other models that the step needs, by name."""
        return {}

    def annotations(self) -> Mapping[str, Annotation]:
        """Frozen models that are run over the data before the first step, by name."""
        return {}

    def rehearsed(self) -> Self:
        return self.model_copy(update={"evaluate": None})

    def objection(self, begun: Self, key: str) -> str | None:
        if more := self.companions().keys() - begun.companions().keys():
            return f"the stage began without the model '{more.pop()}', which it would need from then on"
        if begun.annotations() and self.data != begun.data:
            return "a model was asked about the data as they are mixed, before the first step"
        return super().objection(begun, key)


class WorkRecipe(StageConfig):
    """Base of the kind ``recipes`` for stages that do something else than train."""

    changes: ClassVar[Mapping[str, Change]] = {EVERY: never("all that the stage makes is made alike")}

    pool: Name = "train"
    """The pool of ``compute.pools`` whose workers do it."""
    threads: Positive | None = None
    """CPU threads of each worker; by default the machine's cores, shared out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What models compute in: ``auto`` is fp32 on a CPU, and on CUDA the dtype that the checkpoint is stored in."""
