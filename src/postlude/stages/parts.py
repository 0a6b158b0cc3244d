"""What every stage needs, whatever it does: its manifest, its data sets, tokenizers, and the places of models.

A rank builds everything from the resolved manifest and the run directory alone, so it can be started anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from postlude import __version__
from postlude.data.dataset import Dataset, NothingLeft
from postlude.data.example import Format
from postlude.data.remote_code import code_digest, trust
from postlude.data.sources.stage import FromStage
from postlude.data.tokenizer import load_tokenizer
from postlude.errors import DataError
from postlude.manifest.compute import Shape, shape_of
from postlude.manifest.graph import maker_of
from postlude.manifest.load import restore
from postlude.manifest.lock import hash_of, versions
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import DatasetConfig, Manifest, ModelPlace, StageConfig, TokenizerFrom
from postlude.runs import Run, artifact_of, provenance
from postlude.secrecy import kept
from postlude.stages.task import StageTask
from postlude.training.workers import Workers

ConfigType = TypeVar("ConfigType", bound=StageConfig)


@dataclass(frozen=True)
class Mode:
    """What a stage is opened for; by default to run."""

    sample: int | None = None
    """Each data set ends after so many records."""
    artifacts: Run | None = None
    """The run in which the artifacts of other stages are looked for, where it is not the task's own."""
    preflight: bool = False
    """What stages will make may be stood in for by a few records of a trial."""
    small: bool = False
    """A rehearsal: small random models stand in for the stage's, and little is done with them."""


class Parts:
    """The parts of one stage on one rank, each built when it is first asked for.

    ``finished_tokenizer`` says which tokenizer another stage's artifact will have.
    """

    def __init__(
        self,
        task: StageTask,
        workers: Workers,
        mode: Mode,
        finished_tokenizer: Callable[[StageTask, Workers, Mode], PreTrainedTokenizerBase],
    ) -> None:
        self.task, self.workers, self.mode = task, workers, mode
        self.manifest: Manifest = restore(task.tree)
        config = self.manifest.stages[task.stage]
        self.config: StageConfig = config.rehearsed() if mode.small else config
        self.run = Run(task.run)
        self.artifacts = mode.artifacts or self.run
        self.stage = self.run.stage(task.stage)
        self._finished_tokenizer = finished_tokenizer
        self._datasets: dict[tuple[str, int | None], Dataset] = {}

    def config_of(self, recipe: type[ConfigType]) -> ConfigType:
        """The stage's keys, as those of a kind of recipe."""
        assert isinstance(self.config, recipe), f"a {type(self.config).__name__} names a stage that works on others"
        return self.config

    def rehearsal(self) -> Parts:
        """The parts of the same stage made small. Records that were read are not read again."""
        small = Parts(self.task, self.workers, replace(self.mode, small=True), self._finished_tokenizer)
        small._datasets = self._datasets
        return small

    @cached_property
    def today(self) -> datetime | None:
        """What a template is told that asks for the date: the manifest's day, or when the stage first ran, also on the
        day of a resume."""
        identity = self.stage.identity()
        day = self.manifest.today or (identity.day if identity else None)
        if day is not None:
            return datetime.fromisoformat(day)
        begun_at = self.stage.status().begun_at
        return datetime.fromisoformat(begun_at) if begun_at else None

    def lineage(self, steps: int, **fields: Any) -> dict[str, Any]:
        """What the stage's artifact came from after so many steps, or portions: the manifest, the stages before it, and
        everything that computed; ``fields`` are those of its kind of stage."""
        return {
            "run": self.run.name,
            "stage": self.task.stage,
            "recipe": self.config.recipe,
            "steps": steps,
            "manifest_sha256": hash_of(kept(self.task.tree)),
            **provenance(self.run, self.task.stage),
            **kept(fields),
            "versions": {**versions(), "postlude": __version__},
        }

    # --- data -----------------------------------------------------------------------------------------------

    def dataset(self, name: str, accepts: tuple[type, ...], limit: int | None = None) -> Dataset:
        """A named data set with its filters applied. ManifestError if its format makes none of the shapes."""
        shapes = shapes_of(self.manifest.data[name])
        if not any(issubclass(shape, accepts) for shape in shapes):
            raise ManifestError(
                f"data.{name}.format '{self.manifest.data[name].format.component_name}' makes {_listed(shapes)}, but "
                f"the recipe '{self.config.recipe}' of stages.{self.task.stage} takes {_listed(accepts)}. "
                "Choose another format."
            )
        if (name, limit) not in self._datasets:
            self._datasets[name, limit] = self._read(name, limit)
        return self._datasets[name, limit]

    def _read(self, name: str, limit: int | None) -> Dataset:
        config = self.located(self.manifest.data[name])
        if limit is not None:
            config = config.model_copy(update={"limit": min(limit, config.limit or limit)})
        try:
            return Dataset(name, config, self.run.cache, sample=self.mode.sample)
        except NothingLeft:
            if not (self.mode.preflight and self.makers([name])):
                raise
            # What drops all of a trial may well let the rest through.
            config = config.model_copy(update={"filters": []})
            return Dataset(name, config, self.run.cache, sample=self.mode.sample)

    def located(self, config: DatasetConfig) -> DatasetConfig:
        """A data set that a stage makes, with the files that it made as the source."""
        if not isinstance(config.source, FromStage):
            return config
        maker = self.artifacts.stage(config.source.from_)
        if not maker.has_artifact():
            raise DataError(f"The stage '{maker.name}' of {maker.uri} has not made its data yet. Run it first.")
        return config.model_copy(update={"source": config.source.at(maker.artifact)})

    def makers(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the data sets that a stage makes, with the stage."""
        return {name: maker for name in names if (maker := maker_of(self.manifest.data[name]))}

    # --- models ---------------------------------------------------------------------------------------------

    def place_of(self, start: ModelPlace) -> str | None:
        """The directory or hub name behind ``path`` or ``from``; None for ``new``.

        ManifestError if ``from`` names a stage that makes no model.
        """
        if start.from_ is not None:
            self._before(start.from_)
            place = self.artifacts.stage(start.from_).artifact
        elif start.path is None:
            return None
        else:
            place = artifact_of(start.path) or start.path
        self.trust(start, place)
        return place

    def trust(self, part: ModelPlace | TokenizerFrom, place: str) -> None:
        """Let the code that stands at a place be run if the manifest says so, and what is made of it. ManifestError if
        it is not the code that the stage was begun with."""
        if part.trust_remote_code is None:
            return
        identity = None if self.mode.preflight or part.path is None else self.stage.identity()
        if identity is not None and code_digest(place) not in identity.code.values():
            raise ManifestError(
                f"stages.{self.task.stage}: the code at '{place}' has changed since the stage was begun. Put it back "
                "as it was, or run again."
            )
        trust(place)
        trust(self.stage.uri)

    def is_there(self, start: ModelPlace) -> bool:
        """Whether a model is there, or still has to be made by its stage."""
        return start.from_ is None or self.artifacts.stage(start.from_).has_artifact()

    def root(self, start: ModelPlace) -> ModelPlace:
        """Where a model comes from in the end, through stages that may not have run yet.

        ManifestError if a stage on the way makes no model.
        """
        while not self.is_there(start):
            start = self._before(start.from_ or "")
        return start

    def _before(self, name: str) -> ModelPlace:
        """What the model of a stage is made from. ManifestError if the stage makes none."""
        stage = self.manifest.stages[name]
        before = stage.base_model()
        if before is None:
            raise ManifestError(
                f"stages.{self.task.stage}: the stage '{name}' makes no model to start from: its recipe is "
                f"'{stage.recipe}'. Name a stage that trains or merges models."
            )
        return before

    def tokenizer_of(self, start: ModelPlace) -> PreTrainedTokenizerBase:
        """The tokenizer of a model; of one that a stage still has to make, the one that it will have."""
        if not self.is_there(start):
            self.root(start)  # tells what is wrong on the way
            maker = replace(self.task, stage=start.from_ or "")
            return self._finished_tokenizer(maker, self.workers, self.mode)
        path = self.place_of(start)
        if path is None:
            raise ManifestError(
                f"stages.{self.task.stage}: a new model has no tokenizer of its own. "
                "Give 'tokenizer' with one of path, train and bytes."
            )
        return load_tokenizer(path)

    @property
    def base_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model that the stage's model is made from. ManifestError if it makes none."""
        return self.tokenizer_of(self._before(self.task.stage))


def devices_of(task: StageTask) -> tuple[float, Callable[[int], Shape | None]]:
    """The devices of each worker of the stage's pool (with 0 it computes on the CPU), and how so many ranks hold each
    model together: None where each has all of it, as one alone does whatever the manifest says. The latter raises
    ManifestError if they do not divide."""
    manifest = restore(task.tree)
    config = manifest.stages[task.stage]
    pool = manifest.compute.pools.get(config.pool or "")
    parallel = getattr(config, "parallel", None)
    return (
        pool.gpus_per_worker if pool else 0,
        lambda world: None if parallel is None or world == 1 else shape_of(parallel, world),
    )


def shapes_of(config: DatasetConfig) -> tuple[type, ...]:
    """The shapes of examples that a data set's format makes."""
    produces = Format.of(config.format).produces
    return get_args(produces) or (produces,)


def _listed(shapes: Iterable[type]) -> str:
    return ", ".join(shape.__name__ for shape in shapes)
