"""Starters: commented manifests that run as they are. Each recipe brings its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import cast

from postlude.manifest.component import lookup, names
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import StageConfig
from postlude.manifest.text import parse_inline
from postlude.manifest.value import Origin


@dataclass(frozen=True)
class Starter:
    """A manifest to begin with, and the small files that it needs beside it."""

    text: str
    files: dict[str, str] = field(default_factory=dict)
    """Texts by path."""


def starter(recipe: str, stem: str) -> Starter:
    """The starter of a recipe; ``stem`` is the path of the manifest to be without its suffix.

    Raises:
        ManifestError: there is no such recipe, or it brings no starter.
    """
    try:
        found = cast(type[StageConfig], lookup("recipes", recipe)).starter(stem)
    except KeyError as error:
        raise ManifestError(error.args[0]) from error
    if found is None:
        raise ManifestError(f"The recipe '{recipe}' brings no starter. Another may: {', '.join(names('recipes'))}.")
    return found


def run_name(stem: str) -> str:
    """A name for the run that a manifest describes, from the manifest's path."""
    base = re.split(r"[/\\]", stem)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._")
    is_text = isinstance(parse_inline(name, Origin("command line")).content, str)
    return name if is_text else f"run-{name}".strip("-")
