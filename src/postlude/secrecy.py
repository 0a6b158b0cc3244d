"""What is not to be told: the one place that knows secrets, and takes them out of whatever is shown or written.

A secret is known because it was given (a value of ``compute.environment``, a password or a token in a URI, a value
under a key that is called ``password``), or by the name of the variable that holds it (``HF_TOKEN``). Values are kept
in the memory of each process that needs them, nowhere else.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

LEAST = 6
"""Characters of a secret. What is shorter stands in other words by chance."""

_KEY = re.compile(
    r"(^|_)(secrets?|passwords?|passwd|passphrase|credentials?|bearer|webhook|(api|access|private|secret|signing)_?key"
    r"|(access|api|auth|bearer|hf|hub|refresh|security|session)_?token)$|^token$",
    re.IGNORECASE,
)
"""Keys of a manifest that hold a secret by their name."""
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY)$", re.IGNORECASE)
"""Variables of an environment that do."""
_NAMED = "POSTLUDE_SECRET_VARIABLES"
"""The variable that names others which are secrets, for processes that are started."""
_NOT_SECRET = (("compute", "transport"),)
"""Parts of the manifest where such a key names a file."""

_BEGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
_URI = re.compile(_BEGIN.pattern + r"[^\s\"'<>]+")
_ALL_USERS = ("http", "https", "ftp", "ftps")
"""Protocols whose user may be a token. With others a part before the @ may name a container."""
_PARAMETER = re.compile(
    r"^(x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|key-pair-id|signature|sig|policy|password|passwd|pwd|secret"
    r"|credentials?|auth|authorization|(.*[_-])?(token|secret|api_?key|apikey|access_?key))$",
    re.IGNORECASE,
)
"""Parameters of a URI that let in whoever has them."""
_OF_A_SIGNATURE = {"expires", "se", "sp", "sv", "st", "sr", "ss", "srt", "spr", "sip", "ske", "skt", "sks", "skv"}
_OF_A_SIGNATURE |= {"skoid", "sktid", "sdd", "scid"}
"""Parameters that change with each signature, and mean nothing without one."""

_given: dict[str, str] = {}
"""Secrets that were given, each with the name that stands for it."""


# --- knowing ------------------------------------------------------------------------------------------------


def learn(value: str, name: str) -> None:
    """Take a value for a secret from now on, which is told as ``<name>``."""
    if len(value) >= LEAST and not value.startswith(("/", "~/", "./")):
        _given[value] = name


def learn_variable(name: str, value: str) -> None:
    """The same for a variable that was given, if it is a secret."""
    if is_secret_variable(name, value):
        learn(value, name)


def is_secret_variable(name: str, value: str) -> bool:
    """Whether a variable that was given has the name of a secret, or looks like one."""
    mixed = re.search(r"\d", value) and re.search(r"[A-Za-z]", value) and len(value) >= 8
    return bool(_names_secret(name) or mixed or len(value) >= 20)


def name_to_children(variables: Mapping[str, str]) -> None:
    """Let the processes that this one starts know which of its variables are secrets."""
    os.environ[_NAMED] = ",".join(name for name, value in variables.items() if is_secret_variable(name, value))


def learn_from(document: Any, path: tuple[str, ...] = ()) -> None:
    """Learn the secrets in plain data: credentials in URIs, and what stands under keys that are called so."""
    if isinstance(document, str):
        if _is_secret(path):
            learn(document, path[-1])
        for uri in _uris(document):
            for secret in _credentials(uri):
                learn(secret, "secret")
                learn(unquote(secret), "secret")
    elif isinstance(document, Mapping):
        for key, item in document.items():
            learn_from(item, (*path, str(key)))
    elif isinstance(document, list | tuple):
        for item in document:
            learn_from(item, path)


def stand_in(name: str, value: str) -> str:
    """What stands for a secret where its change is to be seen: the start of a digest of both."""
    return f"sha256:{hashlib.sha256(f'{name}={value}'.encode()).hexdigest()[:16]}"


# --- taking out ---------------------------------------------------------------------------------------------


def without_secrets(text: str) -> str:
    """A text for people without the secrets that this process knows, and without credentials in URIs."""
    return _without(text, _known())


def told(document: Any) -> Any:
    """Plain data for people: every text in it, :func:`without_secrets`."""
    known = _known()

    def tell(part: Any) -> Any:
        if isinstance(part, str):
            return _without(part, known)
        if isinstance(part, Mapping):
            return {key: tell(item) for key, item in part.items()}
        return [tell(item) for item in part] if isinstance(part, list | tuple) else part

    return tell(document)


def _known() -> list[tuple[str, str]]:
    """The secrets of this process with their names, the longest first: one may be part of another."""
    named = os.environ.get(_NAMED, "").split(",")
    of_environment = {value: name for name, value in os.environ.items() if _names_secret(name) or name in named}
    known = {value: name for value, name in of_environment.items() if len(value) >= LEAST and value[0] not in "/~."}
    return sorted({**known, **_given}.items(), key=lambda entry: -len(entry[0]))


@functools.lru_cache
def _names_secret(variable: str) -> bool:
    return _VARIABLE.search(variable) is not None


def _without(text: str, known: list[tuple[str, str]]) -> str:
    if "://" in text:
        text = _URI.sub(lambda found: stripped(found[0]), text)
    for value, name in known:
        if value in text:
            text = text.replace(value, f"<{name}>")
    return text


def kept(document: Any, path: tuple[str, ...] = ()) -> Any:
    """Plain data as they may be stored: URIs without credentials, and digests for what is a secret by its key.

    It follows from the data alone, and of what is kept already it changes nothing. Keys may be dotted.
    """
    if isinstance(document, str):
        if _is_secret(path) and not re.fullmatch(r"sha256:[0-9a-f]{16}", document):
            return stand_in(path[-1], document)
        return stripped(document) if _BEGIN.match(document) else stripped_all(document)
    if isinstance(document, Mapping):
        return {stripped_all(str(key)): kept(item, (*path, *str(key).split("."))) for key, item in document.items()}
    return [kept(item, path) for item in document] if isinstance(document, list | tuple) else document


def stripped(uri: str) -> str:
    """A URI without user, password, and what else lets in whoever has it. A path stays as it is."""
    scheme, is_uri, rest = uri.partition("://")
    if not is_uri:
        return uri
    head, separator, fragment = rest.partition("#")
    head, mark, query = head.partition("?")
    authority, slash, path = _authority(head)
    user, at, host = authority.rpartition("@")
    if at and (":" in user or scheme.lower() in _ALL_USERS):
        authority = host
    query, fragment = _open_part(query), _open_part(fragment)
    return f"{scheme}://{authority}{slash}{path}{mark if query else ''}{query}{separator if fragment else ''}{fragment}"


def without_credentials(uri: str, remedy: str) -> str:
    """The URI as it is. ValueError if there is something in it that :func:`stripped` takes out."""
    if stripped(uri) != uri:
        raise ValueError(f"an address holds no user, password or key. {remedy}")
    return uri


def stripped_all(text: str) -> str:
    """A text whose URIs are :func:`stripped`."""
    return _URI.sub(lambda found: stripped(found[0]), text) if "://" in text else text


def _authority(head: str) -> tuple[str, str, str]:
    """Host with user and password, and the path. A password may have slashes that should have been written as %2F."""
    authority, slash, path = head.partition("/")
    _, colon, port = authority.rpartition(":")
    if "@" not in authority and colon and port and not port.isdecimal() and not port.endswith("]") and "@" in path:
        user, _, rest = head.rpartition("@")
        host, slash, path = rest.partition("/")
        return f"{user}@{host}", slash, path
    return authority, slash, path


def _open_part(query: str) -> str:
    """The parameters of a query that anybody may see."""
    parameters = query.split("&")
    names = [unquote(parameter.partition("=")[0]).lower() for parameter in parameters]
    signed = any(name in ("sig", "signature") for name in names)
    shown = [
        parameter
        for parameter, name in zip(parameters, names, strict=True)
        if not ("=" in parameter and (_PARAMETER.match(name) or (signed and name in _OF_A_SIGNATURE)))
    ]
    return "&".join(shown)


def _uris(text: str) -> list[str]:
    return [text] if _BEGIN.match(text) else _URI.findall(text)


def _credentials(uri: str) -> list[str]:
    """What :func:`stripped` takes out of a URI, and is a secret by itself."""
    scheme, _, rest = uri.partition("://")
    head, _, fragment = rest.partition("#")
    head, _, query = head.partition("?")
    user, at, _ = _authority(head)[0].rpartition("@")
    name, colon, password = user.partition(":")
    found = ([password] if colon else []) + ([name] if at and scheme.lower() in _ALL_USERS else [])
    for parameter in (*query.split("&"), *fragment.split("&")):
        key, equals, value = parameter.partition("=")
        if equals and _PARAMETER.match(unquote(key)):
            found.append(value)
    return found


def is_secret_key(name: str) -> bool:
    """Whether what stands under a key that is called so is a secret."""
    return bool(_KEY.search(name))


def _is_secret(path: tuple[str, ...]) -> bool:
    """Whether what stands at this path of a manifest is a secret by its name."""
    named = next((part for part in reversed(path) if not part.isdecimal()), "")
    return is_secret_key(named) and not any(path[: len(open_part)] == open_part for open_part in _NOT_SECRET)
