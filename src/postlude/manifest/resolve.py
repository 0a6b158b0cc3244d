"""Resolution: the defaults, the stage and the command line become one value, each part with its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from postlude.manifest.component import Config, keys_of
from postlude.manifest.inherit import overlay
from postlude.manifest.problem import Problem
from postlude.manifest.subschema import ANYTHING, MANIFEST, STAGE, Subschema
from postlude.manifest.value import Value
from postlude.nearest import suggestion_or_list


def resolve(written: Value, assigned: Value) -> tuple[Value, list[Problem]]:
    """What a manifest's text and the command line amount to: ``defaults`` are gone, folded into the stages.

    Also the problems that only show here: defaults that no stage takes.
    """
    whole = overlay(_without_stages(written), _without_stages(assigned), MANIFEST)
    stages = written.get("stages") or assigned.get("stages")
    if stages is None:
        return whole, []
    if not stages.is_mapping:
        return replace(whole, content={**whole.content, "stages": stages}), []
    above = [layer for layer in (written.get("defaults"), assigned.get("defaults")) if layer]
    defaults = [layer for layer in above if layer.is_mapping]
    problems = [
        Problem(layer.place, "defaults", "must be a mapping of keys that stages inherit")
        for layer in above
        if not layer.is_mapping and layer.content is not None
    ]
    own = [written.mapping("stages"), assigned.mapping("stages")]
    recipes = {}
    folded = {}
    for name in dict.fromkeys([*own[0], *own[1]]):
        layers = [STAGE.expand(stages[name]) for stages in own if name in stages]
        named = next((layer for layer in reversed([*defaults, *layers]) if layer.get("recipe")), None)
        recipes[name] = STAGE.config({"recipe": named.text("recipe") if named else None})
        folded[name] = _fold(defaults, layers, recipes[name])
    if all(recipes.values()):
        keys = {key for recipe in recipes.values() if recipe for key in keys_of(recipe)}
        problems += [
            Problem(value.place, f"defaults.{key}", f"no stage has this key.{suggestion_or_list(key, keys)}")
            for layer in defaults
            for key, value in layer.content.items()
            if key not in keys
        ]
    return replace(whole, content={**whole.content, "stages": replace(stages, content=folded)}), problems


def _without_stages(value: Value) -> Value:
    return replace(value, content={k: v for k, v in value.content.items() if k not in ("defaults", "stages")})


def _fold(defaults: Sequence[Value], layers: Sequence[Value], recipe: type[Config] | None) -> Value:
    """A stage's own layers over those of the defaults that its recipe has."""
    if layers[-1].content is None:
        layers = [*layers[:-1], replace(layers[-1], content={})]
    if not all(layer.is_mapping for layer in layers):
        return layers[-1]
    takes: Mapping[str, str] = keys_of(recipe) if recipe else {"recipe": "recipe"}
    inherited = [replace(layer, content={k: v for k, v in layer.content.items() if k in takes}) for layer in defaults]
    subschema = Subschema(recipe) if recipe else ANYTHING
    whole = reduce(lambda below, above: overlay(below, above, subschema), [*inherited, *layers])
    return replace(whole, origin=layers[0].origin, key_origin=layers[0].key_origin)
