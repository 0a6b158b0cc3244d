"""From a stage of a manifest to a trainer: what every training recipe shares.

A rank builds everything from the resolved manifest and the run directory alone, so that it can be started
anywhere. Preflight and preview build the same parts and stop earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from postlude import runs, storage
from postlude.data.dataset import Dataset
from postlude.data.document import Block, Unit
from postlude.data.encode import Encoder
from postlude.data.encoded import EncodedDataset
from postlude.data.loader import Loader
from postlude.data.tokenizer import load_tokenizer, train_tokenizer
from postlude.manifest.errors import ManifestError
from postlude.manifest.load import restore
from postlude.manifest.schema import DatasetConfig, Manifest, ModelFrom
from postlude.recipes.recipe import TrainingRecipe
from postlude.training.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        self.run = runs.Run(task.run)
        self.stage = self.run.stage(task.stage)

    # --- data -----------------------------------------------------------------------------------------------

    def dataset(self, name: str, limit: int | None = None) -> Dataset:
        """A named data set with its filters applied, checked against the shapes that the recipe takes."""
        config: DatasetConfig = self.manifest.data[name]
        produces = config.format.produces  # type: ignore[attr-defined]
        if not issubclass(produces, self.config.accepts):
            takes = ", ".join(shape.__name__ for shape in self.config.accepts)
            raise ManifestError(
                f"data.{name}.format '{config.format.component_name}' makes {produces.__name__}, but the recipe "
                f"'{self.config.recipe}' of stages.{self.task.stage} takes {takes}. Choose another format."
            )
        if limit is not None:
            config = config.model_copy(update={"limit": min(limit, config.limit or limit)})
        return Dataset(name, config, self.run.cache, sample=self.sample)

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        """The data sets that the stage trains on."""
        return {name: self.dataset(name) for name in self.config.data}

    def encoded(self, dataset: Dataset) -> EncodedDataset:
        """A data set whose rows come as packed units of token ids."""
        config = dataset.config
        encoder = Encoder(
            self.tokenizer,
            template=config.template,
            train_on=config.train_on,
            block=self.config.batch.block,
            truncate=config.truncate,
        )

        def units(documents: Sequence[Any]) -> tuple[Unit, ...]:
            return self.config.units(documents)

        return EncodedDataset(dataset, encoder, units)

    @cached_property
    def loader(self) -> Loader:
        """The exact loader over the stage's mixture, dealing this rank its blocks."""
        return self.new_loader({name: self.encoded(dataset) for name, dataset in self.datasets.items()})

    def new_loader(self, sources: dict[str, EncodedDataset]) -> Loader:
        config = self.config
        return Loader(
            sources,
            dict(config.data),
            seed=self.manifest.seed,
            block=config.batch.block,
            blocks_per_step=config.batch.tokens // config.batch.block,
            window=config.batch.window,
            epochs=config.epochs,
            steps=config.steps,
            rank=self.workers.rank,
            world=self.workers.world,
        )

    @cached_property
    def evaluations(self) -> dict[str, list[Block]]:
        """This rank's held-out blocks by data set: one pass, packed in order once."""
        if self.config.evaluate is None:
            return {}
        held_out = {}
        for name in self.config.evaluate.data:
            source = self.encoded(self.dataset(name, self.config.evaluate.limit))
            loader = Loader(
                {name: source},
                {name: 1.0},
                seed=self.manifest.seed,
                block=self.config.batch.block,
                blocks_per_step=self.config.batch.tokens // self.config.batch.block,
                window=self.config.batch.window,
                epochs=1,
                steps=None,
                rank=self.workers.rank,
                world=self.workers.world,
            )
            held_out[name] = [block for step in loader for block in step.blocks]
            loader.close()
        return held_out

    # --- tokenizer and models -------------------------------------------------------------------------------

    @cached_property
    def model_path(self) -> str | None:
        """Where the model's files are: None for a new one."""
        return self.resolve(self.config.model)

    def resolve(self, start: ModelFrom) -> str | None:
        """The directory or hub name behind ``path`` or ``from``; None for ``new``."""
        if start.from_ is not None:
            return self.run.stage(start.from_).artifact
        if start.path is None or storage.exists(start.path):
            return start.path
        return runs.artifact_of(start.path) or start.path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The stage's tokenizer. One that is trained is trained once, by the leading rank, and kept in the stage."""
        asked = self.config.tokenizer
        if asked is None:
            if self.model_path is None:
                raise ManifestError(
                    f"stages.{self.task.stage}: a new model has no tokenizer of its own. "
                    "Give 'tokenizer' with one of path, train and bytes."
                )
            return load_tokenizer(self.model_path)
        if asked.train is None:
            return load_tokenizer(asked)
        kept = self.stage.tokenizer
        if self.workers.leads and not storage.exists(kept):
            train_tokenizer(asked.train, self._texts()).save_pretrained(kept)
        self.workers.barrier()
        return load_tokenizer(kept)

    def _texts(self) -> Iterator[str]:
        for dataset in self.datasets.values():
            for group, rows in enumerate(dataset.groups):
                for start in range(0, rows, 1024):
                    for examples in dataset.examples(group, range(start, min(start + 1024, rows))):
                        for _, example in examples:
                            yield from _texts_of(example)


def _texts_of(example: Example) -> Iterator[str]:
    if isinstance(example, Conversation):
        for message in example.messages:
            if isinstance(message.get("content"), str):
                yield message["content"]
    elif isinstance(example, Text):
        yield "".join(text for text, _ in example.pieces)
