"""``postlude preview``: what a stage would see first, token by token: the packed blocks that it trains on, or the
prompts that it puts to a model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from postlude import storage
from postlude.data.preview import Preview
from postlude.manifest.load import load
from postlude.runs import Run
from postlude.stages.parts import Mode, StageTask
from postlude.stages.stage import open_stage
from postlude.training.workers import Workers
from postlude.workflow.selection import Selection


def preview(manifest_path: str, overrides: Sequence[str], stage: str | None = None, blocks: int = 1) -> Preview:
    """The first ``blocks`` packed blocks of a stage (the first stage by default), or its first prompts.

    Data and models that another stage makes are taken from the run, if they are there. Writes nothing into the run.
    """
    resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
    name = Selection(stage).stages(resolved.manifest)[-1 if stage else 0]
    run = Run(storage.join(resolved.manifest.run_dir, resolved.manifest.name))
    with tempfile.TemporaryDirectory(prefix="postlude-") as scratch:
        task = StageTask(resolved.tree, name, storage.join(scratch, resolved.manifest.name), threads=1)
        return open_stage(task, Workers(), Mode(artifacts=run)).preview(blocks)
