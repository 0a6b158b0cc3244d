"""The lock: what a run was begun with. The resolved manifest, its hashes, the versions of all that computes.

What bears on a stage's result is its own config, the data sets that it reads, the seed, and how many workers it
has; where those run, where numbers are sent and how often a checkpoint is written can change at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from postlude.manifest.component import Component
from postlude.manifest.graph import datasets_used, needs
from postlude.manifest.load import Resolved
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import DatasetConfig
from postlude.manifest.text import parse
from postlude.secrecy import kept

_HEADER = "# Written by postlude: the resolved manifest of this run, and what ran it. Not for editing.\n"
ANEW = "`postlude run` with the run's manifest writes it anew."
_DISTRIBUTIONS = ("postlude", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class LockedStage:
    """What the lock says of a stage besides its config."""

    hash: str
    """SHA-256 of what the manifest says that bears on its result: :func:`bearing`."""
    data: list[str]
    """The data sets that it reads."""
    pools: list[str]
    """The pools whose workers it runs on."""
    threads: int | None = None
    """CPU threads of each worker, as they were set."""
    needs: list[str] = field(default_factory=list)
    """The stages that it hangs on."""
    fingerprint: str | None = None
    """SHA-256 of all that its result follows from, those stages and the content of the data included."""


@dataclass(frozen=True)
class Lock:
    """The content of ``manifest.lock.yaml``."""

    hash: str
    """SHA-256 of the resolved manifest."""
    versions: dict[str, str]
    stages: dict[str, LockedStage]
    manifest: dict[str, Any] = field(repr=False)
    """The resolved manifest, as :attr:`~postlude.manifest.load.Resolved.tree`, without secrets."""


def lock(
    resolved: Resolved, threads: Mapping[str, int] | None = None, fingerprints: Mapping[str, str] | None = None
) -> Lock:
    """The lock of a resolved manifest on this machine, without secrets. ``threads`` are those of each stage's
    workers."""
    stages = {}
    for name, config in resolved.manifest.stages.items():
        stages[name] = LockedStage(
            hash=hash_of(bearing(resolved, name)),
            data=sorted(set(datasets_used(config).values())),
            pools=list(config.all_pools),
            threads=(threads or {}).get(name),
            needs=needs(resolved.manifest, name),
            fingerprint=(fingerprints or {}).get(name),
        )
    tree = kept(resolved.tree)
    return Lock(hash_of(tree), versions(), stages, tree)


def dump_lock(locked: Lock) -> str:
    """A lock as YAML, which :func:`read_lock` reads."""
    document = {**vars(locked), "stages": {name: vars(stage) for name, stage in locked.stages.items()}}
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 10**9
    yaml.dump(document, text)
    return _HEADER + text.getvalue()


class _Representer(SafeRepresenter):
    """Quotes texts with line breaks and other characters that are not seen, so that they are read back exactly."""

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def read_lock(text: str | bytes, name: str = "manifest.lock.yaml") -> Lock:
    """The lock in a file's text. ManifestError if it is none, or its hash is not that of its manifest."""
    document = parse(text, name).plain()
    try:
        if document["hash"] != hash_of(document["manifest"]):
            raise ManifestError(f"{name} is damaged: its hash is not that of the manifest in it. {ANEW}")
        stages = {key: LockedStage(**stage) for key, stage in document["stages"].items()}
        return Lock(document["hash"], document["versions"], stages, document["manifest"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{name} is not a lock that this version of postlude wrote: {error!r}. {ANEW}") from error


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What two accounts of :func:`bearing` do not share, one line for each key: ``seed: 1 -> 2``."""
    return [
        f"{key}: {_show(before, key)} -> {_show(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if key not in before or key not in after or before[key] != after[key]
    ]


def bearing(resolved: Resolved, stage: str) -> dict[str, Any]:
    """What the manifest says that bears on a stage's result, by dotted key: its :func:`basis` without the keys that
    its recipe calls free."""
    config = resolved.manifest.stages[stage]
    data = sorted(set(datasets_used(config).values()))
    # Which pools they are cannot change the result, only how many workers those have.
    free = [f"stages.{stage}.{key}" for key in (*config.pool_keys, *config.free, *_unset_later(config))]
    leaves = flat(kept(basis(resolved.tree, stage, data, config.all_pools)))
    return {key: value for key, value in leaves.items() if not any(f"{key}.".startswith(f"{name}.") for name in free)}


def _unset_later(config: BaseModel, path: str = "") -> Iterator[str]:
    """The dotted keys of a stage that are its configurations' ``later`` ones and have their default."""
    for name, info in type(config).model_fields.items():
        key, value = f"{path}{info.alias or name}", getattr(config, name)
        if name in getattr(config, "later", ()) and _is_default(value, info):
            yield key
        elif isinstance(value, BaseModel):
            yield from _unset_later(value, f"{key}.")


def _is_default(value: Any, info: FieldInfo) -> bool:
    default = info.get_default(call_default_factory=True)
    if isinstance(value, Component) and isinstance(default, str):
        return value.component_name == default and value == type(value)()
    return bool(value == default)


def basis(tree: Mapping[str, Any], stage: str, data: Collection[str], pools: Collection[str]) -> dict[str, Any]:
    """The part of a resolved tree that bears on a stage's result, given the data sets and the pools that it uses."""
    workers = [tree["compute"]["pools"].get(name, {}).get("workers", 1) for name in pools] or [1]
    return {
        "seed": tree["seed"],
        "data": {
            name: {key: value for key, value in tree["data"][name].items() if key not in DatasetConfig.free}
            for name in data
        },
        "compute": {"workers": workers[0] if len(workers) == 1 else workers},
        "stages": {stage: tree["stages"][stage]},
    }


def versions() -> dict[str, str]:
    """The versions of everything that computes, and the git commit where this package is a checkout."""
    installed = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _git_commit(Path(__file__).parent)
    return {**installed, "postlude_commit": commit} if commit else installed


def _git_commit(folder: Path) -> str | None:
    """The commit that this package's files are checked out from, with ``-dirty`` if they differ from it.

    A package that only happens to be installed below a repository is not of its commit: git must know this file.
    """
    try:
        for arguments in (
            ["ls-files", "--error-unmatch", __file__],
            ["describe", "--always", "--abbrev=40", "--dirty"],
        ):
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted path. An empty collection is a leaf, a list of scalars too."""
    if isinstance(tree, Mapping) and tree:
        items: Iterator[tuple[Any, Any]] = iter(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, (dict, list)) for item in tree):
        items = iter(enumerate(tree))
    else:
        return {path: tree}
    return {
        key: value for name, item in items for key, value in flat(item, f"{path}.{name}" if path else str(name)).items()
    }


def hash_of(document: Any) -> str:
    """SHA-256 of what JSON can hold, in hexadecimal; the order of keys does not matter."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _show(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "(not set)"
    text = json.dumps(flat[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
