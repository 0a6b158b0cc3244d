"""The last part of a preflight of a stage that trains: what it will weigh, and one real optimiser step of it, small.

The plan (:mod:`postlude.model.memory`) is that of the whole model, which is never allocated. The step runs the
stage's own data, objective, optimiser and precision through the unmodified trainer, on a model of the same
architecture and vocabulary with random weights and at most two layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from postlude.data.loader import StepBlocks
from postlude.errors import UserError
from postlude.model.load import configuration, count_parameters
from postlude.stages.annotate import annotated, check_annotations
from postlude.stages.memory import check_fits, check_mesh, plan_of
from postlude.stages.models import LARGEST_PARAMETERS
from postlude.stages.report import Rehearsal
from postlude.stages.training_models import TrainingModels
from postlude.training.meters import Meters
from postlude.training.precision import Precision
from postlude.training.trainer import Steps, Trainer


def rehearse(models: TrainingModels, small: TrainingModels, steps: Callable[[], Steps]) -> Rehearsal:
    """Plan the memory of a stage's models, and make one step of the stage opened small. UserError if the step's loss or
    gradient is not finite."""
    check_annotations(models)
    config, task = models.config, models.parts.task
    beside = {name: companion.start for name, companion in config.companions().items()}
    beside |= {name: annotation.start for name, annotation in config.annotations().items()}
    for name, start in beside.items():
        models.check_same_tokens(name, start)
    whole = models.configuration(config.model)
    check_mesh(models, whole)
    plan = plan_of(models, whole)
    check_fits(models, whole, plan)
    starts = [config.model, *beside.values()]
    sizes = [count_parameters(configuration(small.start_of(start), None, models.data.tokenizer)) for start in starts]
    precision = Precision.choose(config.precision, models.parts.workers.device, None, config.half)
    chance = math.log(whole.get_text_config().vocab_size)
    if sum(sizes) > LARGEST_PARAMETERS:
        return Rehearsal(plan, precision, None, None, chance)
    line = _one_step(small, steps)
    if not all(math.isfinite(line[name]) for name in ("loss", "grad_norm")):
        raise UserError(
            f"stages.{task.stage}: one step on a small random model of this architecture gave loss "
            f"{line['loss']} and gradient norm {line['grad_norm']}. Look at precision and at the weights in the data."
        )
    return Rehearsal(plan, small.precision, line["loss"], line["grad_norm"], chance)


class _LastLine:
    """A journal that keeps the last line of metrics."""

    def __init__(self) -> None:
        self.line: dict[str, Any] = {}

    def metrics(self, line: Mapping[str, Any]) -> None:
        self.line = dict(line)

    def examples(self, step: int, epoch: int, rows: Sequence[tuple[str, str, float, int]]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def flush(self) -> None: ...

    @property
    def examples_told(self) -> int:
        return 0

    def account(self, examples: int) -> dict[str, Any]:
        return {}


def _one_step(small: TrainingModels, steps: Callable[[], Steps]) -> dict[str, Any]:
    """The metrics of one step on the first block."""
    journal, parts, program = _LastLine(), small.parts, small.program
    with closing(steps()) as loader:
        trainer = Trainer(
            small.config,
            program,
            loader,
            parts.workers,
            seed=parts.manifest.seed,
            precision=small.precision,
            journal=journal,
            meters=Meters(None, parts.workers, small.precision, parts.task.threads),
        )
        work = next(iter(loader))
    blocks = [annotated(small, block) for block in work.blocks[:1]]
    trainer.train(StepBlocks(blocks, work.epoch, work.progress, work.documents, work.tokens))
    trainer.checkpointer.close()
    return journal.line
