"""The key ``storage``: what places need that stand below a prefix. Names of places are compared here as well, so that
a manifest is checked before anything is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from postlude.manifest.component import Config
from postlude.manifest.value import KeyPath
from postlude.secrecy import stripped, without_credentials

S3 = ("s3", "s3a")
_OF_S3 = ("endpoint", "region", "profile", "role", "role_seconds", "checksums")
"""Keys that mean nothing elsewhere."""


def _endpoint(address: str | None) -> str | None:
    if address is not None:
        if not re.match(r"https?://[^/\s]+", address):
            raise ValueError("it must begin with https:// or http://, and name a host")
        without_credentials(address, "Name a profile, or a role, in its place.")
    return address


def _role(role: str | None) -> str | None:
    if role is not None and not re.fullmatch(r"arn:aws[a-z-]*:iam::\d+:role/[\w+=,.@/-]+", role):
        raise ValueError(f"'{role}' is no role; its ARN reads arn:aws:iam::ACCOUNT:role/NAME")
    return role


class Encryption(Config):
    """How what is written is encrypted."""

    key: Annotated[str, Field(min_length=1)]
    """The master key: ``alias/NAME``, an id or an ARN of AWS KMS; ``file:PATH`` of a key file."""


class PlaceRule(Config):
    """What places below a prefix need. Nothing of it is a secret."""

    endpoint: Annotated[str | None, AfterValidator(_endpoint)] = None
    """The address of a store that speaks S3 and is not AWS's."""
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = None
    """Of the bucket; by default what the environment says."""
    profile: Annotated[str, Field(min_length=1)] | None = None
    """A profile of AWS's configuration files on each machine; by default its usual chain of credentials."""
    role: Annotated[str | None, AfterValidator(_role)] = None
    """The ARN of a role that is assumed for these places alone."""
    role_seconds: Annotated[int, Field(ge=900, le=43200)] | None = None
    """How long a session of the role lasts before it is renewed; by default 3600."""
    read_only: bool = False
    """Nothing is ever opened for writing here, and the session of the role could not."""
    encrypt: Encryption | None = None
    """Encrypt what is written here."""
    checksums: Literal["when_required"] | None = None
    """``when_required`` for stores that refuse the checksums which are sent with each object."""


Places = dict[str, PlaceRule]
"""Rules by prefix: a local path, relative ones from the working directory as everywhere, or a URI."""


def is_local(uri: str) -> bool:
    """Whether a place is a path of this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def plain(uri: str) -> str:
    """A place as it is compared with others: a local one as its whole path, ``s3a`` as ``s3``."""
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(uri.partition("://")[2] if "://" in uri else uri))
    protocol, _, path = uri.partition("://")
    return f"{'s3' if protocol in S3 else protocol}://{path}".rstrip("/")


def is_below(place: str, prefix: str) -> bool:
    """Whether a place is the prefix or stands below it, both :func:`plain`."""
    return place == prefix or place.startswith(prefix.rstrip("/") + "/")


def covering(prefixes: Iterable[str], place: str) -> str | None:
    """The longest of the prefixes that a place falls under, all :func:`plain`; None if it falls under none."""
    return max((prefix for prefix in prefixes if is_below(place, prefix)), key=len, default=None)


def problems(places: Mapping[str, Any], run_dir: str | None = None) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with plain rules beside their schema, each with the keys that lead there. ``run_dir`` is what the
    run is written to."""
    known: dict[str, str] = {}
    for prefix, rule in places.items():
        if not prefix or "*" in prefix or re.match(r"\w+:(?!//)|/.*://", prefix):
            yield (prefix,), "it is no prefix: give a folder, s3://BUCKET/ or s3://BUCKET/FOLDER/"
            continue
        if stripped(prefix) != prefix:
            yield (), "a prefix holds no user, password or key. Name a profile, or a role, in its place"
            continue
        place = plain(prefix)
        if place in known:
            yield (prefix,), f"the same place as '{known[place]}': give it once"
        known[place] = prefix
        given = [key for key, value in rule.items() if value is not None] if isinstance(rule, Mapping) else []
        is_s3 = place.partition(":")[0] == "s3" and not is_local(prefix)
        for key in given:
            if key in _OF_S3 and not is_s3:
                what = "a local path" if is_local(prefix) else f"'{prefix.partition('://')[0]}://'"
                yield (prefix, key), f"only places of S3 have this key, and '{prefix}' is {what}. Remove it."
            elif key == "role" and place == "s3:":
                yield (prefix, key), "a role is for a bucket or a part of one: give a prefix such as s3://BUCKET/"
            elif key == "role_seconds" and "role" not in given:
                yield (prefix, key), "it is how long a session of a role lasts, and no role is named"
    cover = covering(known, plain(run_dir)) if run_dir else None
    if cover is not None and isinstance(rule := places[known[cover]], Mapping) and rule.get("read_only") is True:
        yield (
            (known[cover], "read_only"),
            f"the run is written below it: run_dir is '{run_dir}'. Give run_dir a rule of its own, or another place",
        )


_OF_PLACES = ("path", "run_dir", "tables")
"""Keys under which a text is the name of a place."""


def places_in(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """The places that a resolved tree names, each with the path of its key."""
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            if (*path, key) not in (("storage",), ("compute",), ("notify",)):
                yield from places_in(item, (*path, str(key)))
    elif isinstance(tree, list):
        for number, item in enumerate(tree):
            yield from places_in(item, (*path, number))
    elif isinstance(tree, str) and (re.match(r"\w+://", tree) or any(part in _OF_PLACES for part in path[-2:])):
        yield path, tree


def rule_for(places: Mapping[str, PlaceRule], uri: str) -> tuple[str, PlaceRule] | None:
    """The rule that a place falls under, with its prefix as it was written."""
    prefixes = {plain(prefix): prefix for prefix in places}
    found = covering(prefixes, plain(uri))
    return None if found is None else (prefixes[found], places[prefixes[found]])


def described(prefix: str, rule: PlaceRule) -> str:
    """A rule in words."""
    said = [f"{key} {value}" for key, value in rule if isinstance(value, str) and value]
    said += [f"encrypted with {rule.encrypt.key}"] if rule.encrypt else []
    return f"'{prefix}': {', '.join([*said, *['read-only'] * rule.read_only]) or 'nothing set'}"
