"""Inheritance: a value laid over another, as the schema says that their parts go together.

Mappings are merged key by key, everything else is replaced. Three kinds of mapping are not simply merged:

- a component under another name replaces the component whole (``optimizer: muon`` drops adamw's keys);
- of keys that exclude each other the upper one stands alone (``model: {from: sft}`` drops ``path``);
- a mixture of data sets replaces the mixture.

What is replaced is remembered as ``previous``.
"""

from __future__ import annotations

from dataclasses import replace

from postlude.manifest.subschema import Subschema
from postlude.manifest.value import Value


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
