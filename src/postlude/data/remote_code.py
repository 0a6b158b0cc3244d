"""Code that models and tokenizers bring along: run only where the manifest says so, and as it was when the run was
planned.

Whether transformers may run such code is asked of this module at every place that loads something, with the folder or
the hub name that it is loaded from; by default it may not, and is not asked about it on the terminal either.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from postlude import storage
from postlude.manifest.problem import ManifestError

_trusted: set[str] = set()

REMEDY = (
    "It brings code of its own, which is not run. Read that code; to have it run, say 'trust_remote_code: true' beside "
    "the path in the manifest."
)


def trust(place: str) -> None:
    """Let the code of a folder, and of what stands below it, or of a hub name be run in this process."""
    _trusted.add(_absolute(place))


def is_trusted(place: str | None) -> bool:
    """Whether code from a folder or of a hub name may be run."""
    absolute = _absolute(place or "")
    return any(absolute == known or absolute.startswith(f"{known}/") for known in _trusted)


def code_digest(place: str) -> str:
    """SHA-256 of the code that a model brings along, of all of its files. ManifestError if it names code elsewhere, of
    which nothing is known here, or has to be fetched from a URI."""
    if not storage.has_path(place):
        raise ManifestError(f"trust_remote_code: '{place}' is no folder of this machine and no hub name. Copy it here.")
    folder = Path(storage.local_path(place))
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(place, allow_patterns=["*.py", "*.json"]))
    for file in sorted(folder.glob("*.json")):
        with suppress(ValueError, OSError):
            if "--" in json.dumps(json.loads(file.read_text(encoding="utf-8")).get("auto_map", "")):
                raise ManifestError(
                    f"trust_remote_code: {file.name} of '{place}' names code of another model on the hub, which may "
                    "change at any time. Copy that code beside it and name it in 'auto_map'."
                )
    digests = [
        f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}"
        for file in sorted(folder.rglob("*.py"))
    ]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _absolute(place: str) -> str:
    return str(Path(place).absolute()) if storage.is_local(place) and Path(place).exists() else place
