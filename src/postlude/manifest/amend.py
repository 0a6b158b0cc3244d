"""Amendments: the few keys of a stage that may change while it runs, one KEY=VALUE at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from postlude.manifest.problem import ManifestError
from postlude.manifest.refusals import phrase
from postlude.manifest.schema import StageConfig
from postlude.manifest.text import parse_inline
from postlude.manifest.value import Origin
from postlude.nearest import suggestion

StageType = TypeVar("StageType", bound=StageConfig)


@dataclass(frozen=True)
class Amendment:
    """A checked change to one key of a stage."""

    key: str
    before: Any
    value: Any


def check_amendment(stage: StageConfig, assignment: str) -> Amendment:
    """Read and check a KEY=VALUE for a stage; the key is the stage's own, such as ``optimizer.lr``.

    Raises:
        ManifestError: the key may not change while the stage runs, the stage does not have it, or the value is
            not one that it can have.
    """
    key, _ = _parse(stage, assignment)
    before = stage.model_dump(mode="json", by_alias=True)
    after = apply_amendment(stage, assignment).model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        before, after = before[part], after[part]
    return Amendment(key, before, after)


def apply_amendment(stage: StageType, assignment: str) -> StageType:
    """The stage's config with one key changed. Raises as :func:`check_amendment` does."""
    key, value = _parse(stage, assignment)
    tree = stage.model_dump(mode="json", by_alias=True)
    *above, last = key.split(".")
    here = tree
    for part in above:
        here = here[part] if isinstance(here, dict) else None
    if not isinstance(here, dict) or last not in here:
        raise ManifestError(f"'{assignment}' changes nothing: this stage has no {key}.")
    here[last] = value
    try:
        return type(stage).model_validate(tree)
    except ValidationError as error:
        why = "; ".join(phrase(details) for details in error.errors(include_url=False))
        raise ManifestError(f"'{assignment}' cannot be: the value {why}") from error


def _parse(stage: StageConfig, assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals:
        raise ManifestError(f"'{assignment}' is not an amendment: it takes KEY=VALUE, such as optimizer.lr=1e-5.")
    if key not in stage.amendable:
        raise ManifestError(
            f"'{key}' may not change while a stage of the recipe '{stage.recipe}' runs. What may: "
            f"{', '.join(stage.amendable) or 'nothing'}.{suggestion(key, stage.amendable)}"
        )
    return key, parse_inline(text, Origin("command line", assignment=assignment)).plain()
