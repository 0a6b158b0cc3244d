"""The parts of a stage that does something else than train."""

from __future__ import annotations

from itertools import islice

from postlude.data.dataset import Dataset
from postlude.manifest.problem import ManifestError
from postlude.runs import Run
from postlude.stages.models import ForwardModels
from postlude.stages.parts import StageTask
from postlude.stages.work import WorkRecipe
from postlude.training.workers import Workers

REHEARSED_RECORDS = 4
"""So many records of each data set a preflight works on."""


class Workbench(ForwardModels):
    """Parts with models. One that ``rehearses`` has small random models in place of the stage's, and few records."""

    def __init__(
        self,
        task: StageTask,
        workers: Workers,
        sample: int | None = None,
        artifacts: Run | None = None,
        rehearses: bool = False,
    ) -> None:
        super().__init__(task, workers, sample, artifacts)
        self.rehearses = rehearses
        if not isinstance(self.stage_config, WorkRecipe):
            raise ManifestError(f"stages.{task.stage}: the recipe '{self.stage_config.recipe}' trains a model.")
        self.config = self.stage_config.rehearsed() if rehearses else self.stage_config

    def rows(self, dataset: Dataset) -> list[tuple[int, int]]:
        """The rows of a data set as group and position, in order: all, or the first ones in a rehearsal."""
        places = ((group, position) for group, count in enumerate(dataset.groups) for position in range(count))
        return list(islice(places, REHEARSED_RECORDS) if self.rehearses else places)
