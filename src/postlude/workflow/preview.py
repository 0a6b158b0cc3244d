"""``postlude preview``: what a stage would see first, token by token: the packed blocks that it trains on, or the
prompts that it puts to a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice

from postlude import storage
from postlude.data import preview as packed
from postlude.data.document import Block, Document, Unit
from postlude.data.loader import StepBlocks
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.recipes.online import OnlineRecipe
from postlude.runs import Run
from postlude.stages.online import OnlineAssembly
from postlude.stages.parts import StageTask
from postlude.stages.training import Assembly
from postlude.stages.work import WorkRecipe
from postlude.stages.workbench import Workbench
from postlude.training.workers import Workers
from postlude.workflow.selection import stages_in_order

PROMPTS_SHOWN = 8
"""Prompts that stand for a block, where a stage has no blocks."""


def preview(manifest_path: str, overrides: Sequence[str], stage: str | None = None, blocks: int = 1) -> packed.Preview:
    """The first ``blocks`` packed blocks of a stage (the first stage by default), or its first prompts.

    Data and models that another stage makes are taken from the run, if they are there. Writes nothing into the run.
    """
    resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
    name = stages_in_order(resolved, stage)[-1 if stage else 0]
    run = Run(storage.join(resolved.manifest.run_dir, resolved.manifest.name))
    with tempfile.TemporaryDirectory(prefix="postlude-") as scratch:
        task = StageTask(resolved.tree, name, storage.join(scratch, resolved.manifest.name), threads=1)
        config = resolved.manifest.stages[name]
        if isinstance(config, WorkRecipe):
            bench = Workbench(task, Workers(), artifacts=run)
            shown = list(islice(config.begin(bench).prompts(), blocks * PROMPTS_SHOWN))
            start = getattr(config, "model", None) or next(iter(getattr(config, "models", {}).values()), None)
            if not shown or start is None:
                raise ManifestError(
                    f"stages.{name}: the recipe '{config.recipe}' puts no prompts to a model, so there is nothing to "
                    "preview. Name another stage with --stage."
                )
            return packed.preview(_as_steps(shown), bench.tokenizer_of(start), blocks)
        if isinstance(config, OnlineRecipe):
            online = OnlineAssembly(task, Workers(), artifacts=run)
            asked = list(islice(online.prompts(), blocks * PROMPTS_SHOWN))
            return packed.preview(_as_steps(asked), online.tokenizer, blocks)
        assembly = Assembly(task, Workers(), artifacts=run)
        with assembly.loader as loader:
            return packed.preview(loader, assembly.tokenizer, blocks)


def _as_steps(documents: Sequence[Document]) -> Iterable[StepBlocks]:
    """Prompts as steps of one block each."""
    for first in range(0, len(documents), PROMPTS_SHOWN):
        some = documents[first : first + PROMPTS_SHOWN]
        block: Block = tuple(Unit((document,)) for document in some)
        yield StepBlocks([block], 0, 0.0, len(some), sum(map(len, some)))
