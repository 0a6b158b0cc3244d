"""Reading a manifest for work: what it says of storage holds in this process from then on."""

from __future__ import annotations

from collections.abc import Sequence

from postlude import storage
from postlude.manifest.load import Resolved, load, load_places
from postlude.storage import rules


def open_manifest(path: str, overrides: Sequence[str]) -> Resolved:
    """The manifest behind a URI, with KEY=VALUE in place of its own. Its rules of storage are those of this process
    now. ManifestError."""
    resolved = load(storage.read_bytes(path), path, overrides)
    rules.use(rules.rules_in(resolved.manifest.storage, resolved.manifest.name))
    return resolved


def use_places_of(path: str) -> None:
    """Have the rules in a file hold in this process: of a manifest, of a run's lock, or of a file that has nothing but
    ``storage``. ManifestError."""
    rules.use(rules.rules_in(load_places(storage.read_bytes(path), path)))
