"""What a training recipe says; everything else is the trainer's.

A recipe is a component: its fields are the stage's keys, its methods name the shapes of data it takes, the
units it makes of an encoded example, the objective, and the other models that the step needs, or that are run over the
data before the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from postlude.data.example import Conversation, Text, Tokens
from postlude.manifest.schema import TrainingStage

if TYPE_CHECKING:
    from postlude.data.document import Document, Unit
    from postlude.objectives.objective import Objective
    from postlude.training.program import Annotation, Companion


class TrainingRecipe(TrainingStage):
    """Base of the kind ``recipes`` for stages that train a model."""

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
