"""What an artifact came from: the manifest, the stages before it, and everything that computed."""

from __future__ import annotations

from typing import Any

from postlude import __version__
from postlude.manifest.lock import hash_of, versions
from postlude.runs import provenance
from postlude.stages.parts import Parts


def lineage(parts: Parts, steps: int, **fields: Any) -> dict[str, Any]:
    """The lineage of a stage's artifact after so many steps, or portions; ``fields`` are those of its kind of stage."""
    return {
        "run": parts.run.name,
        "stage": parts.task.stage,
        "recipe": parts.config.recipe,
        "steps": steps,
        "manifest_sha256": hash_of(parts.task.tree),
        **provenance(parts.run, parts.task.stage),
        **fields,
        "versions": {**versions(), "postlude": __version__},
    }
