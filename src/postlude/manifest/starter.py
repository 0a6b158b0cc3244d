"""Starters: commented manifests that run as they are, with their data. Each is text among a package's data."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from string import Template

from postlude.manifest.component import lookup, names
from postlude.manifest.problem import ManifestError
from postlude.manifest.text import parse_inline
from postlude.manifest.value import Origin


@dataclass(frozen=True)
class StarterFiles:
    """Where a recipe's starter lies: the class variable ``starter`` of its class.

    In the manifest ``$file`` becomes its path (as a shell takes it), ``$stem`` the path without its suffix (within
    double quotes), ``$name`` the name of the run, and ``$recipe`` the name of the recipe.
    """

    package: str
    """The folder, as a package."""
    manifest: str
    """The manifest's file in it."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Files in it that are copied beside the manifest, by what is put after the manifest's stem: ``-pairs.jsonl``."""
    values: Mapping[str, str] = field(default_factory=dict)
    """What becomes of other names after a ``$``."""


@dataclass(frozen=True)
class Starter:
    """A manifest to begin with, and the small files that it needs beside it."""

    text: str
    files: Mapping[str, str]
    """Texts by path."""


def _files_of(recipe: str) -> StarterFiles | None:
    files = getattr(lookup("recipes", recipe), "starter", None)
    return files if isinstance(files, StarterFiles) else None


def starter(recipe: str, stem: str) -> Starter:
    """The starter of a recipe; ``stem`` is the path of the manifest to be without its suffix.

    Raises:
        ManifestError: there is no such recipe, or it brings no starter.
    """
    try:
        files = _files_of(recipe)
    except KeyError as error:
        raise ManifestError(error.args[0]) from error
    if files is None:
        others = ", ".join(name for name in names("recipes") if _files_of(name) is not None)
        raise ManifestError(f"The recipe '{recipe}' brings no starter. These do: {others}.")
    folder = resources.files(files.package)
    text = Template(folder.joinpath(files.manifest).read_text("utf-8")).substitute(
        files.values,
        file=shlex.quote(f"{stem}.yaml"),
        stem=json.dumps(stem, ensure_ascii=False)[1:-1],
        name=run_name(stem),
        recipe=recipe,
    )
    data = {f"{stem}{ending}": folder.joinpath(name).read_text("utf-8") for ending, name in files.data.items()}
    return Starter(text, data)


def run_name(stem: str) -> str:
    """A name for the run that a manifest describes, from the manifest's path."""
    base = re.split(r"[/\\]", stem)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._")
    is_text = isinstance(parse_inline(name, Origin("command line")).content, str)
    return name if is_text else f"run-{name}".strip("-")
