"""Preference optimisation: a policy learns from pairs of answers, or from single ones that are wanted or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from postlude.data.document import Document, Unit
from postlude.manifest.change import from_step, never
from postlude.manifest.component import Component, Named, lookup, names
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.objectives.objective import Objective
from postlude.objectives.preference import PreferenceLoss
from postlude.recipes.recipe import TrainingRecipe
from postlude.training.program import Annotation, Companion

LOSSES = "preference_losses"


class LossByName(Named):
    """A loss as its bare name, whose keys stand beside it in the stage, or as a mapping with all of its keys."""

    def _validate(self, value: Any) -> Component:
        name = value if isinstance(value, str) else value.get("name") if isinstance(value, dict) else None
        if isinstance(name, str) and name in names(self.kind) and not (isinstance(value, dict) and len(value) > 1):
            return lookup(self.kind, name).model_construct()
        return super()._validate(value)

    def _serialize(self, value: Component) -> Any:
        return super()._serialize(value) if value.model_fields_set else value.component_name


class DPO(TrainingRecipe):
    """Direct preference optimisation and its kin, on pairs; and KTO on single judged answers."""

    starter = StarterFiles(
        "postlude.recipes.starters",
        "dpo.yaml",
        {"-answers.jsonl": "answers.jsonl", "-pairs.jsonl": "pairs.jsonl"},
    )

    changes = {
        "loss": never("the step was built for it: its own keys may change"),
        **dict.fromkeys(
            ("beta", "label_smoothing", "gamma", "desirable_weight", "undesirable_weight"),
            from_step("the loss has it"),
        ),
        "reference": never("it is loaded, or asked, before the first step"),
        "precompute_reference": never("it is asked before the first step"),
    }

    recipe: Literal["dpo"]
    loss: Annotated[PreferenceLoss, LossByName(LOSSES), Field(validate_default=True)] = "sigmoid"  # type: ignore
    """``sigmoid`` is DPO itself, with ``label_smoothing`` conservative DPO; ``kto`` takes judged answers, all others
    take pairs. ``simpo`` and ``orpo`` have no reference. A mapping gives the name and all keys of a loss."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How much a difference in log-probability counts; in ``orpo`` the odds ratio beside the likelihood."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """The share of pairs whose sides are taken for exchanged; 0 where it is not given."""
    gamma: float | None = None
    """The margin that ``simpo`` asks for; 0.5 where it is not given."""
    desirable_weight: Annotated[float, Field(gt=0)] | None = None
    """How much a wanted answer counts in ``kto``; 1 where it is not given."""
    undesirable_weight: Annotated[float, Field(gt=0)] | None = None
    """How much an unwanted answer counts in ``kto``; 1 where it is not given."""
    reference: ModelPlace | None = None
    """The frozen model that the policy is kept near; by default the model that the stage starts from."""
    precompute_reference: bool = False
    """Run the reference over the data once, before the first step, and store what it says of each answer's tokens:
    then only the policy is held while it is trained. ``kto`` puts answers to other prompts, and cannot."""

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        name, kind = self.loss.component_name, type(self.loss)
        for key in self._keys():
            if self.loss.model_fields_set and key in kind.model_fields:
                raise ValueError(f"'loss' is a mapping here: '{key}' of the loss '{name}' belongs into it")
            if not _reads(kind, key):
                losses = ", ".join(loss for loss in names(LOSSES) if _reads(lookup(LOSSES, loss), key))
                raise ValueError(f"'loss: {name}' does not read '{key}': it belongs to {losses}")
        try:
            self._complete_loss()
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            key = ".".join(map(str, first["loc"]))
            raise ValueError(str(cause or f"'loss: {name}' and its key '{key}': {first['msg']}")) from error
        return self

    def _keys(self) -> dict[str, Any]:
        """The keys that belong to losses, as far as they are given."""
        optional = ("label_smoothing", "gamma", "desirable_weight", "undesirable_weight", "reference")
        given = {key: value for key in optional if (value := getattr(self, key)) is not None}
        if self.precompute_reference:
            given["precompute_reference"] = True
        return given if self.beta == type(self).model_fields["beta"].default else {"beta": self.beta, **given}

    def _complete_loss(self) -> PreferenceLoss:
        """The loss with all of its keys."""
        if self.loss.model_fields_set:
            return self.loss
        kind = type(self.loss)
        keys = {"beta": self.beta, **self._keys()}
        return kind.model_validate({key: value for key, value in keys.items() if key in kind.model_fields})

    @property
    def accepts(self) -> tuple[type, ...]:
        return self.loss.accepts

    def units(self, documents: Sequence[Document]) -> tuple[Unit, ...]:
        """A pair, or a single answer; of a longer list the best answer and the worst."""
        return (Unit(tuple(documents) if len(documents) <= 2 else (documents[0], documents[-1])),)

    def objective(self) -> Objective:
        return self._complete_loss().objective(self.precompute_reference)

    def companions(self) -> Mapping[str, Companion]:
        if not self.loss.needs_reference or self.precompute_reference:
            return {}
        return {"reference": Companion(self.reference or self.model)}

    def annotations(self) -> Mapping[str, Annotation]:
        from postlude.objectives.annotators import TokenLikelihood

        if not self.precompute_reference:
            return {}
        return {"reference": Annotation(self.reference or self.model, TokenLikelihood())}


def _reads(loss: type[Component], key: str) -> bool:
    """Whether a loss has a use for a key of the recipe."""
    assert issubclass(loss, PreferenceLoss)
    if key == "reference":
        return loss.needs_reference
    if key == "precompute_reference":
        return loss.needs_reference and loss.stores_reference
    return key in loss.model_fields
