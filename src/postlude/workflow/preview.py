"""``postlude preview``: the packed blocks that a stage would train on first, token by token."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from postlude import storage
from postlude.data import preview as packed
from postlude.manifest.load import load
from postlude.recipes.assembly import Assembly, StageTask
from postlude.training.workers import Workers
from postlude.workflow.run import stages_in_order


def preview(manifest_path: str, overrides: Sequence[str], stage: str | None = None, blocks: int = 1) -> packed.Preview:
    """The first ``blocks`` packed blocks of a stage (the first stage by default). Writes nothing into the run."""
    resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
    name = stages_in_order(resolved, stage)[-1 if stage else 0]
    with tempfile.TemporaryDirectory(prefix="postlude-") as scratch:
        task = StageTask(resolved.tree, name, storage.join(scratch, resolved.manifest.name), threads=1)
        assembly = Assembly(task, Workers())
        with assembly.loader as loader:
            return packed.preview(loader, assembly.tokenizer, blocks)
