"""What a rank is told of its work. No torch: the process that controls the ranks needs nothing else of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from postlude import storage


@dataclass(frozen=True)
class StageTask:
    """Which stage of which run to work on: all that a rank needs to be told."""

    tree: dict[str, Any]
    """The resolved manifest."""
    stage: str
    run: str
    """URI of the run directory."""
    threads: int
    engines: Sequence[str] = ()
    """The names of the hosts of engines that answer for it, where these have a pool of their own."""
    guard: storage.Guard | None = None
    """Of the run directory, for ranks in other processes than that which holds the run."""
