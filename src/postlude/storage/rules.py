"""Rules: what places below a prefix need (endpoint, credentials, encryption), said once in the manifest.

Each process of a run is given its rules with its work, and sets them with :func:`use` before it opens anything; they
hold no secret. :func:`rule_of` finds the one for a URI, by the longest prefix that fits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from postlude.manifest.storage import Encryption as Encryption
from postlude.manifest.storage import PlaceRule, covering, is_local, plain


class Rule(PlaceRule):
    """What places below ``prefix`` need. It can be pickled and hashed."""

    prefix: str = ""
    """A whole path or a URI without a slash at its end; empty for the rule that holds where none was given."""
    run: str = ""
    """Whose it is: sessions of a role are called so."""

    @property
    def partition(self) -> str:
        """The part of AWS that it is in."""
        return self.role.split(":")[1] if self.role else "aws"


NO_RULE = Rule()
"""Holds where no prefix fits: nothing is set."""

_rules: dict[str, Rule] = {}
_by_name: dict[str, Rule] = {}
"""Local prefixes also under the path that they have without links."""


def rules_in(places: Mapping[str, PlaceRule] | None, run: str = "") -> tuple[Rule, ...]:
    """The rules that a manifest's ``storage`` gives, with local prefixes as whole paths, for any process."""
    return tuple(Rule(prefix=plain(prefix), run=run, **dict(rule)) for prefix, rule in (places or {}).items())


def use(rules: Iterable[Rule]) -> None:
    """Have these be the rules of this process, and no others."""
    _rules.clear()
    _rules.update({rule.prefix: rule for rule in rules})
    links = {os.path.realpath(prefix): rule for prefix, rule in _rules.items() if is_local(prefix)}
    _by_name.clear()
    _by_name.update({**links, **_rules})


def current() -> tuple[Rule, ...]:
    """The rules of this process, for another that works for it."""
    return tuple(_rules.values())


def rule_of(uri: str) -> Rule:
    """The rule that a URI falls under, by the longest prefix; one with nothing set where none fits."""
    if not _by_name:
        return NO_RULE
    place = plain(uri)
    found = covering(_by_name, place)
    if is_local(uri) and (place := os.path.realpath(place)) and (real := covering(_by_name, place)) is not None:
        found = max(found or "", real, key=len)  # a link may lead below a prefix
    return NO_RULE if found is None else _by_name[found]
