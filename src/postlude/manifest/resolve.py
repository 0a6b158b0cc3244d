"""Resolution: the defaults, the stage and the command line become one value, each part with its origin.

Inheritance is a value laid over another, as the schema says that their parts go together.

Mappings are merged key by key, everything else is replaced. Three kinds of mapping are not simply merged:

- a component under another name replaces the component whole (``optimizer: muon`` drops adamw's keys);
- of keys that exclude each other the upper one stands alone (``model: {from: sft}`` drops ``path``);
- a mixture of data sets replaces the mixture.

What is replaced is remembered as ``previous``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from postlude.manifest.component import Config, keys_of
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


def overlay(below: Value, above: Value, subschema: Subschema, key: str = "") -> Value:
    """The value ``above`` with what it inherits from ``below``.

    ``subschema`` is the schema's view of the place where both stand, ``key`` the last part of its path.
    """
    if below.is_mapping or above.is_mapping:
        below, above = subschema.expand(below), subschema.expand(above)
    if not (below.is_mapping and above.is_mapping):
        return replace(above, previous=(key, below))
    inherits = not _stands_alone(above, below, subschema)
    keys = {**below.plain(), **above.plain()} if inherits else above.plain()
    content = dict(below.content) if inherits else {}
    for name, value in above.content.items():
        under = below.content.get(name)
        if under is None:
            content[name] = value
        elif inherits:
            content[name] = overlay(under, value, subschema.child(keys, name), name)
        else:
            content[name] = replace(value, previous=(name, under))
    config = subschema.config(keys)
    for group in config.exactly_one if config else ():
        _exclude(group, above, below, content)
    place = below if above.partial else above
    previous = None if inherits else (key, below)
    return Value(content, place.origin, place.key_origin, below.partial and above.partial, previous)


def _stands_alone(above: Value, below: Value, subschema: Subschema) -> bool:
    """Whether nothing is inherited although both are mappings."""
    if subschema.names_datasets and not above.partial:
        return True
    named = subschema.branch_for(above.content).named
    if named is None:
        return False
    name = named.name_in(above.plain())
    return name is not None and name != (named.name_in(below.plain()) or named.default)


def _exclude(group: tuple[str, ...], above: Value, below: Value, content: dict[str, Value]) -> None:
    """Drop from ``content`` what a member of the group that ``above`` gives takes the place of."""

    def gives(value: Value, member: str) -> bool:
        return member in value.content and value.content[member].content is not None

    chosen = next((member for member in group if gives(above, member)), None)
    if chosen is None:
        return
    for member in group:
        if member not in above.content and gives(below, member):
            content.pop(member, None)
            content[chosen] = replace(content[chosen], previous=(member, below.content[member]))
