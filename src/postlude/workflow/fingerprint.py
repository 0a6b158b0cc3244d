"""What the result of a stage follows from, gathered before it runs and without importing what is heavy.

- The manifest: its keys without those that are free, the seed, the number of workers.
- The stages that it needs: the fingerprints of their results.
- The files that it reads: data, chat templates, models and tokenizers. A file counts by its content, so that a copy is
  the same and a touched file has not changed; one above :data:`WHOLE_BYTES`, or behind a remote URI, by its size and
  time stamp or entity tag, which never calls a changed file the same. Content is read once: its digest is kept with
  the stage, and holds for as long as size and time of the file stay.
- The code: the version of the recipe, and the source of every component that does not come with this package.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from typing import Any

from pydantic import BaseModel

from postlude import storage
from postlude.data.remote_code import code_digest
from postlude.data.sources.source import Source
from postlude.errors import UserError
from postlude.manifest.component import Component
from postlude.manifest.graph import datasets_used, needs
from postlude.manifest.load import Resolved
from postlude.manifest.lock import bearing
from postlude.manifest.schema import ModelPlace, StageConfig, TokenizerFrom, TokensFrom
from postlude.runs import LINEAGE, Identity, Run, artifact_of, known_identity
from postlude.secrecy import stripped_all

_WRITES_DATE = "strftime_now"
"""The function with which a chat template asks for the date."""
_TEMPLATE_FILES = ["tokenizer_config.json", "*.jinja", "additional_chat_templates/*"]
WHOLE_BYTES = 2**30
"""Up to this size the content of a local file is read."""


@dataclass
class Identifier:
    """Finds out what the result of each stage of a manifest follows from. Writes nothing."""

    resolved: Resolved
    run: Run
    _known: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The content of files by URI, each with the stamp that it was read at."""

    def __post_init__(self) -> None:
        for stage in self.run.stages():
            identity = known_identity(stage)
            if identity is not None:
                contents = {uri: content for files in identity.files.values() for uri, content in files.items()}
                stamps = identity.stamps
                self._known |= {uri: (stamps[uri], contents[uri]) for uri in contents if uri in stamps}

    def __call__(self, stage: str, inputs: Mapping[str, str], revisions: Mapping[str, int]) -> Identity:
        """What the result of a stage follows from, given the results of the stages that it needs and which revisions
        of theirs those are. UserError if a file that it reads is not there."""
        config = self.resolved.manifest.stages[stage]
        files = {
            what: {stripped_all(uri): self._content(uri) for uri in uris} for what, uris in self._files(stage, config)
        }
        read = {uri for contents in files.values() for uri in contents}
        return Identity(
            config=bearing(self.resolved, stage),
            inputs=dict(inputs),
            files=files,
            code=dict(self._code(stage, config)),
            input_revisions=dict(revisions),
            day=self._day(stage),
            stamps={uri: self._known[uri][0] for uri in sorted(read) if uri in self._known},
        )

    # --- files ----------------------------------------------------------------------------------------------

    def _files(self, stage: str, config: StageConfig) -> Iterator[tuple[str, list[str]]]:
        """What the stage reads, each with its files."""
        for name in sorted(set(datasets_used(config).values())):
            dataset = self.resolved.manifest.data[name]
            if isinstance(dataset.source, Source) and (files := dataset.source.files()):
                yield f"data.{name}", files
            if dataset.template is not None and dataset.template.endswith(".jinja"):
                yield f"data.{name}.template", _existing(dataset.template)
        for key, place in places(config, f"stages.{stage}"):
            if model_files := _model_files(place.path or ""):
                yield key, model_files

    def _content(self, uri: str) -> str:
        """A text that stands for what is in a file."""
        stamp = storage.modified_fingerprint(uri)
        if not storage.is_local(uri) or storage.size_bytes(uri) > WHOLE_BYTES:
            return stamp
        known = self._known.get(uri)
        if known is None or known[0] != stamp:
            known = self._known[uri] = (stamp, storage.sha256_of(uri))
        return known[1]

    # --- the day --------------------------------------------------------------------------------------------

    def _day(self, stage: str) -> str | None:
        """What day the stage's templates are told: the manifest's, that of the stage where it has begun, or today;
        None where none of them writes the date."""
        standing = self.run.stage(stage)
        identity = known_identity(standing) if standing.has_begun() else None
        # A version that did not look at templates of the hub began stages without a day, which go on so.
        hub = identity is None or identity.day is not None
        if not any(_WRITES_DATE in template for template in self._templates(stage, hub)):
            return None
        return self.resolved.manifest.today or (date.today().isoformat() if identity is None else identity.day)

    def _templates(self, stage: str, hub: bool) -> Iterator[str]:
        """The texts of the templates that a stage may render with: given ones, those beside its models, and where
        ``hub`` says so those of models of the hub."""
        manifest = self.resolved.manifest
        config = manifest.stages[stage]
        for name in set(datasets_used(config).values()):
            template = manifest.data[name].template
            if template is not None:
                is_path = template.endswith(".jinja")
                yield from (storage.read_text(path) for path in _existing(template)) if is_path else [template]
        for _, place in places(config, ""):
            path = place.path or ""
            for file in _model_files(path) or (_hub_files(path) if hub and path else []):
                if _may_hold_template(file):
                    yield storage.read_text(file)
        for need in needs(manifest, stage):
            yield from self._templates(need, hub)

    # --- code -----------------------------------------------------------------------------------------------

    def _code(self, stage: str, config: StageConfig) -> Iterator[tuple[str, str]]:
        yield f"the recipe {config.recipe}", str(config.version)
        for key, part in _trusting(config, f"stages.{stage}"):
            yield f"the code of {key}", code_digest(artifact_of(part) or part)
        data = [self.resolved.manifest.data[name] for name in datasets_used(config).values()]
        for component in (component for part in (config, *data) for component in _components(part)):
            source = _foreign_source(type(component))
            if source is not None:
                name = component.component_name or type(component).__name__
                yield f"the code of {name}", hashlib.sha256(source.encode()).hexdigest()


def _existing(path: str) -> list[str]:
    return [path] if storage.exists(path) else []


def places(part: Any, key: str) -> Iterator[tuple[str, ModelPlace | TokenizerFrom | TokensFrom]]:
    """The keys below a part of the manifest that say where a model or a tokenizer is, with what says it."""
    if isinstance(part, ModelPlace | TokenizerFrom | TokensFrom) and part.path is not None:
        yield f"{key}.path", part
    for name, below in _below(part):
        yield from places(below, f"{key}.{name}")


def _trusting(part: Any, key: str) -> Iterator[tuple[str, str]]:
    """Those of the keys that let code be run, of models that no stage makes: what a stage makes follows from it."""
    if isinstance(part, ModelPlace | TokenizerFrom) and part.trust_remote_code and part.path is not None:
        yield f"{key}.path", part.path
    for name, below in _below(part):
        yield from _trusting(below, f"{key}.{name}")


def _components(part: Any) -> Iterator[Component]:
    if isinstance(part, Component):
        yield part
    for _, below in _below(part):
        yield from _components(below)


def _below(part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, BaseModel):
        yield from ((field.alias or name, getattr(part, name)) for name, field in type(part).model_fields.items())
    elif isinstance(part, Mapping):
        yield from ((str(name), below) for name, below in part.items())
    elif isinstance(part, list | tuple):
        yield from ((str(number), below) for number, below in enumerate(part))


def _model_files(path: str) -> list[str]:
    """The files behind a model's path: of a directory or an artifact, without its lineage; none for a hub name."""
    try:
        place = artifact_of(path) or path
    except UserError:
        return []  # the stage itself will say what is missing
    if not storage.is_directory(place):
        return _existing(place) if storage.is_local(place) else []
    left = {LINEAGE, storage.MARKER}
    below = storage.expand(storage.join(glob.escape(place), "**"))
    return [uri for uri in below if not storage.is_directory(uri) and storage.name(uri) not in left]


def _may_hold_template(uri: str) -> bool:
    return uri.endswith(".jinja") or storage.name(uri) == "tokenizer_config.json"


@cache
def _hub_files(name: str) -> list[str]:
    """The files with the chat templates of a model of the hub, fetched where they are not on this machine; none where
    they cannot be had, as the stage itself will say."""
    from huggingface_hub import snapshot_download

    for is_local in (True, False):
        try:
            folder = snapshot_download(name, allow_patterns=_TEMPLATE_FILES, local_files_only=is_local)
        except (OSError, ValueError):  # its own errors derive from these
            continue
        if files := [uri for uri in _model_files(folder) if _may_hold_template(uri)]:
            return files
    return []


def _foreign_source(component: type) -> str | None:
    """The source of the module that a component comes from; None for one of this package."""
    if component.__module__.partition(".")[0] == "postlude":
        return None
    module = inspect.getmodule(component)
    try:
        return inspect.getsource(module or component)
    except (OSError, TypeError):  # typed into an interpreter: there is no file
        return component.__qualname__
