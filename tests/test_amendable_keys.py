"""Every key of every recipe says whether it may change while the stage runs, and docs/steering.md shows the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest

from postlude.manifest.change import EVERY, UNSAID, Change
from postlude.manifest.component import Component, Config, keys_of, lookup, names
from postlude.manifest.schema import Manifest, TrainingStage
from postlude.manifest.subschema import Subschema

PAGE = Path(__file__).parents[1] / "docs" / "steering.md"
RECIPES = [name for name in names("recipes") if lookup("recipes", name).__module__.startswith("postlude.")]


def configs_in(subschema: Subschema) -> Iterator[tuple[str, type[Config]]]:
    """The classes that may stand in a field, each with what stands between the field's key and theirs."""
    for branch in subschema.branches():
        if branch.named is not None:
            for name in names(branch.named.kind):
                if (component := lookup(branch.named.kind, name)).__module__.startswith("postlude."):
                    yield "", component
        elif get_origin(branch.annotation) in (list, dict):
            for place, config in configs_in(Subschema(get_args(branch.annotation)[-1])):
                yield f".N{place}", config
        elif isinstance(branch.annotation, type) and issubclass(branch.annotation, Config | Component):
            yield "", branch.annotation


def answers(config: type[Config], path: str = "", above: Change = UNSAID) -> Iterator[tuple[str, Change, Change]]:
    """Every key of a class and below it, with its answer and that of what it stands in."""
    every = config.change_of(EVERY)
    for key, attribute in keys_of(config).items():
        own = config.change_of(key) or above
        yield f"{path}{key}", own, above
        if every is None or every.allowed:
            for place, below in configs_in(Subschema.of_field(config.model_fields[attribute])):
                yield from answers(below, f"{path}{key}{place}.", own)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_a_recipe_says_whether_it_may_change(recipe: str) -> None:
    said = list(answers(lookup("recipes", recipe)))
    assert len(said) > 5
    assert [path for path, change, _ in said if change is UNSAID] == []
    assert all(change.text and not change.text.endswith(".") for _, change, _ in said)


def test_every_key_of_the_manifest_says_whether_it_may_change() -> None:
    for key in keys_of(Manifest):
        change = Manifest.change_of(key)
        assert change is not None, key
        assert not change.allowed, key


def test_no_answer_is_for_a_key_that_is_not_there() -> None:
    def classes(config: type[Config]) -> set[type[Config]]:
        below = {each for info in config.model_fields.values() for _, each in configs_in(Subschema.of_field(info))}
        return {config}.union(*map(classes, below))

    for config in set().union(*(classes(lookup("recipes", recipe)) for recipe in RECIPES)):
        said = {key for base in config.__mro__ for key in base.__dict__.get("changes", {})}
        assert said <= {*keys_of(config), EVERY}, config


def table() -> str:
    """The keys of the recipes that train, where their answer is another than that of what they stand in."""
    trains = [name for name in RECIPES if issubclass(lookup("recipes", name), TrainingStage)]
    rows: dict[tuple[str, Change], list[str]] = {}
    for recipe in trains:
        for path, change, above in dict.fromkeys(answers(lookup("recipes", recipe))):
            if change != above:
                rows.setdefault((path, change), []).append(recipe)
    lines = ["| key | recipes | from the next | what it changes, or why it may not |", "| --- | --- | --- | --- |"]
    for (path, change), recipes in sorted(rows.items(), key=lambda row: (not row[0][1].allowed, row[0][0])):
        which = "all" if recipes == trains else ", ".join(recipes)
        lines.append(f"| `{path}` | {which} | {change.holds} | {change.text} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_answers() -> None:
    assert table() in PAGE.read_text(), f"Put this into {PAGE.name}:\n\n{table()}"
