"""From a stage of a manifest to a trainer: what every training recipe shares.

A rank builds everything from the resolved manifest and the run directory alone, so it can be started anywhere.
Preflight and preview build the same parts and stop earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from postlude import storage
from postlude.data.dataset import Dataset
from postlude.data.document import Block
from postlude.data.encode import Encoder
from postlude.data.encoded import EncodedDataset
from postlude.data.example import Conversation, texts_of
from postlude.data.loader import Loader
from postlude.data.sources.stage import FromStage
from postlude.data.tokenizer import load_tokenizer, train_tokenizer
from postlude.manifest.errors import DataError, ManifestError
from postlude.manifest.load import restore
from postlude.manifest.schema import DatasetConfig, Manifest, ModelFrom, ModelPlace
from postlude.model.flops import packed_flops
from postlude.model.load import load_model
from postlude.recipes.recipe import TrainingRecipe
from postlude.runs import Run, artifact_of
from postlude.telemetry.progress import waiting
from postlude.telemetry.recorder import Recorder
from postlude.training.amendments import Amendments
from postlude.training.meters import Meters
from postlude.training.precision import Precision
from postlude.training.program import Program, Role
from postlude.training.trainer import Trainer
from postlude.training.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from postlude.model.language_model import LanguageModel


@dataclass(frozen=True)
class StageTask:
    """Which stage of which run to work on: all that a rank needs to be told."""

    tree: dict[str, Any]
    """The resolved manifest."""
    stage: str
    run: str
    """URI of the run directory."""
    threads: int


class Assembly:
    """The parts of one stage on one rank, each built when it is first asked for.

    ``sample`` limits every data set to its first records, for a preflight.
    """

    def __init__(self, task: StageTask, workers: Workers, sample: int | None = None) -> None:
        self.task, self.workers, self.sample = task, workers, sample
        self.manifest: Manifest = restore(task.tree)
        config = self.manifest.stages[task.stage]
        if not isinstance(config, TrainingRecipe):
            raise ManifestError(f"stages.{task.stage}: the recipe '{config.recipe}' does not train a model.")
        self.config = config
        self.run = Run(task.run)
        self.stage = self.run.stage(task.stage)

    @property
    def gpus_per_worker(self) -> int:
        """Devices of each worker of the stage's pool; 0 computes on the CPU."""
        pools = self.manifest.compute.pools
        return next((pools[name].gpus_per_worker for name in self.config.all_pools if name in pools), 0)

    # --- data -----------------------------------------------------------------------------------------------

    def dataset(self, name: str, limit: int | None = None) -> Dataset:
        """A named data set with its filters applied. ManifestError if the recipe cannot train on its format."""
        config = self._located(self.manifest.data[name])
        shapes = _shapes(config)
        if not any(issubclass(shape, self.config.accepts) for shape in shapes):
            raise ManifestError(
                f"data.{name}.format '{config.format.component_name}' makes {_listed(shapes)}, but the recipe "
                f"'{self.config.recipe}' of stages.{self.task.stage} takes {_listed(self.config.accepts)}. "
                "Choose another format."
            )
        if limit is not None:
            config = config.model_copy(update={"limit": min(limit, config.limit or limit)})
        return Dataset(name, config, self.run.cache, sample=self.sample)

    def _located(self, config: DatasetConfig) -> DatasetConfig:
        """A data set that a stage makes, with the files that it made as the source."""
        if not isinstance(config.source, FromStage):
            return config
        made = self.run.stage(config.source.from_)
        if not made.has_artifact():
            raise DataError(f"The stage '{made.name}' of {self.run.uri} has not made its data yet. Run it first.")
        return config.model_copy(update={"source": config.source.at(made.artifact)})

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        """The data sets that the stage trains on."""
        return {name: self.dataset(name) for name in self.config.data}

    def encoded(self, dataset: Dataset) -> EncodedDataset:
        """A data set whose rows come as units of token ids."""
        config = self.manifest.data[dataset.name]
        encoder = Encoder(
            self.tokenizer,
            template=config.template,
            train_on=config.train_on,
            block=self.config.batch.block,
            truncate=config.truncate,
            today=self._begun,
        )
        return EncodedDataset(dataset, encoder, self.config.units, config.on_bad_record)

    @cached_property
    def _begun(self) -> datetime | None:
        """When the stage first ran: what a template is told that asks for the date, also on the day of a resume."""
        begun_at = self.stage.status().begun_at
        return datetime.fromisoformat(begun_at) if begun_at else None

    @cached_property
    def sources(self) -> dict[str, EncodedDataset]:
        """The data sets that the stage trains on, encoded."""
        return {name: self.encoded(dataset) for name, dataset in self.datasets.items()}

    @property
    def conversations(self) -> dict[str, EncodedDataset]:
        """Those of the sources whose format makes conversations."""
        return {
            name: source for name, source in self.sources.items() if Conversation in _shapes(self.manifest.data[name])
        }

    @cached_property
    def loader(self) -> Loader:
        """The exact loader over the stage's mixture, dealing this rank its blocks."""
        return self._loader(self.sources, self.config.data, epochs=self.config.epochs, steps=self.config.steps)

    @cached_property
    def evaluations(self) -> dict[str, list[Block]]:
        """This rank's held-out blocks by data set: one pass over each, packed once."""
        if self.config.evaluate is None:
            return {}
        held_out = {}
        for name in self.config.evaluate.data:
            source = self.encoded(self.dataset(name, self.config.evaluate.limit))
            with self._loader({name: source}, {name: 1.0}, epochs=1, steps=None) as loader:
                held_out[name] = [block for step in loader for block in step.blocks]
        return held_out

    def _loader(
        self,
        sources: Mapping[str, EncodedDataset],
        weights: Mapping[str, float],
        *,
        epochs: int | None,
        steps: int | None,
    ) -> Loader:
        batch = self.config.batch
        return Loader(
            sources,
            weights,
            seed=self.manifest.seed,
            block=batch.block,
            blocks_per_step=batch.tokens // batch.block,
            window=batch.window,
            epochs=epochs,
            steps=steps,
            rank=self.workers.rank,
            world=self.workers.world,
            waiting=waiting,
        )

    # --- tokenizer ------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The stage's tokenizer. One that is trained is trained once, by the leading rank, and kept in the stage."""
        asked = self.config.tokenizer
        if asked is None:
            path = self.place_of(self.config.model)
            if path is None:
                raise ManifestError(
                    f"stages.{self.task.stage}: a new model has no tokenizer of its own. "
                    "Give 'tokenizer' with one of path, train and bytes."
                )
            return load_tokenizer(path)
        if asked.train is None:
            return load_tokenizer(asked)
        kept = self.stage.tokenizer
        if self.workers.leads and not storage.is_committed(kept):
            with storage.new_folder(kept) as folder, waiting("the tokenizer to be trained"):
                train_tokenizer(asked.train, self._texts()).save_pretrained(folder)
        self.workers.barrier()
        return load_tokenizer(kept)

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the artifact: with the template that the conversations were rendered with, if it is one."""
        given = {source.encoder.given_template for source in self.conversations.values()}
        template = given.pop() if len(given) == 1 else None
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer in what was trained on."""
        return sorted({stop for source in self.conversations.values() for stop in source.encoder.stop_ids})

    def _texts(self) -> Iterator[str]:
        for dataset in self.datasets.values():
            for group, rows in enumerate(dataset.groups):
                for start in range(0, rows, 1024):
                    for examples in dataset.examples(group, range(start, min(start + 1024, rows))):
                        for _, example in examples:
                            yield from texts_of(example)

    # --- models ---------------------------------------------------------------------------------------------

    def place_of(self, start: ModelPlace) -> str | None:
        """The directory or hub name behind ``path`` or ``from``; None for ``new``."""
        if start.from_ is not None:
            return self.run.stage(start.from_).artifact
        if start.path is None:
            return None
        return artifact_of(start.path) or start.path

    def model(self, start: ModelPlace) -> LanguageModel:
        """A model on this rank's device, recomputing and compiled as the stage says."""
        model = load_model(start, self.place_of(start), self.tokenizer, seed=self.manifest.seed)
        model.to(self.workers.device)
        if self.config.recompute == "layer":
            model.recompute_layers()
        if self.config.compile:
            model.compile_layers()
        return model

    def with_model(self, start: ModelFrom) -> Assembly:
        """The same stage with another model to start from. Records and tokenizer are shared, what is counted is not."""
        other = copy(self)
        other.config = self.config.model_copy(update={"model": start})
        for built in ("program", "precision", "sources", "loader"):
            other.__dict__.pop(built, None)
        return other

    @cached_property
    def program(self) -> Program:
        """The recipe's objective, and every model that it needs with its heads."""
        objective = self.config.objective()
        roles = {"policy": Role(self.model(self.config.model), self.config.optimizer)}  # type: ignore[arg-type]
        for name, companion in self.config.companions().items():
            roles[name] = Role(self.model(companion.start), companion.optimizer)
        for name, heads in objective.heads.items():
            if "scalar" in heads:
                roles[name].model.add_scalar_head()
        for role in roles.values():
            role.model.requires_grad_(role.optimizer is not None).train()
        return Program(objective, roles)

    @cached_property
    def precision(self) -> Precision:
        """The compute dtype, with the reason for it."""
        stored = self.program.roles["policy"].model.stored_dtype
        return Precision.choose(self.config.precision, self.workers.device, stored)

    # --- the trainer ----------------------------------------------------------------------------------------

    def trainer(self, recorder: Recorder, stop: Callable[[], bool]) -> Trainer:
        """The trainer, at step 0."""
        models = [role.model for role in self.program.roles.values()]
        return Trainer(
            self.config,
            self.program,
            self.loader,
            self.workers,
            seed=self.manifest.seed,
            precision=self.precision,
            journal=recorder,
            meters=Meters(packed_flops(models), self.workers, self.precision, self.task.threads),
            evaluations=self.evaluations,
            checkpoint_uri=self.stage.checkpoint_uri,
            on_commit=lambda uri, step: self._committed(recorder, uri, step),
            amendments=Amendments(self.stage),
            stop=stop,
        )

    def _committed(self, recorder: Recorder, uri: str, step: int) -> None:
        recorder.event("checkpoint_saved", step=step, uri=uri)
        self.stage.prune(self.config.checkpoint.keep)


def _shapes(config: DatasetConfig) -> tuple[type, ...]:
    """The shapes of examples that a data set's format makes."""
    produces = config.format.produces  # type: ignore[attr-defined]
    return get_args(produces) or (produces,)


def _listed(shapes: Iterable[type]) -> str:
    return ", ".join(shape.__name__ for shape in shapes)
