"""From a stage of a manifest to a trainer: what every training recipe shares.

Preflight and preview build the same parts and stop earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.data.annotations import StoredStreams
from postlude.data.dataset import Dataset
from postlude.data.document import Block
from postlude.data.encode import Encoder
from postlude.data.encoded import EncodedDataset
from postlude.data.example import Conversation, texts_of
from postlude.data.loader import Loader
from postlude.data.tokenizer import (
    NewTokens,
    check_same_ids,
    has_tokenizer,
    load_tokenizer,
    train_tokenizer,
    with_new_tokens,
)
from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, ModelPlace, TokensFrom
from postlude.model.adapters.attached import AdapterRequest
from postlude.model.adapters.inject import WithoutAdapter
from postlude.model.added_tokens import config_with_tokens
from postlude.model.flops import packed_flops
from postlude.model.load import configuration, load_divided, load_model
from postlude.recipes.recipe import TrainingRecipe
from postlude.runs import Run
from postlude.stages.parts import Parts, StageTask, shapes_of
from postlude.telemetry.progress import waiting
from postlude.telemetry.recorder import Recorder
from postlude.training.amendments import Amendments
from postlude.training.meters import Meters
from postlude.training.precision import Precision
from postlude.training.program import Program, Role
from postlude.training.trainer import Trainer
from postlude.training.workers import Workers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from postlude.model.language_model import LanguageModel
    from postlude.model.mesh import Mesh


class Assembly(Parts):
    """The parts of one training stage on one rank, each built when it is first asked for."""

    def __init__(
        self, task: StageTask, workers: Workers, sample: int | None = None, artifacts: Run | None = None
    ) -> None:
        super().__init__(task, workers, sample, artifacts)
        if not isinstance(self.stage_config, TrainingRecipe):
            raise ManifestError(f"stages.{task.stage}: the recipe '{self.stage_config.recipe}' does not train a model.")
        self.config = self.stage_config
        self.replaced: dict[str, ModelPlace] = {}
        """Models that stand in for others in a rehearsal, by name."""
        self.stored: Sequence[StoredStreams] = ()
        """What frozen models said of the data beforehand, once they have: added to the blocks that loaders hand out."""

    # --- data -----------------------------------------------------------------------------------------------

    def dataset(self, name: str, limit: int | None = None) -> Dataset:
        """A named data set with its filters applied. ManifestError if the recipe cannot train on its format."""
        return self.dataset_of(name, self.config.accepts, limit)

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        """The data sets that the stage trains on."""
        return {name: self.dataset(name) for name in self.config.data}

    @cached_property
    def held_out(self) -> dict[str, Dataset]:
        """The data sets that the stage is evaluated on."""
        evaluate = self.config.evaluate
        return {name: self.dataset(name, evaluate.limit) for name in evaluate.data} if evaluate else {}

    @property
    def all_datasets(self) -> list[Dataset]:
        """Every data set that the stage reads, once."""
        every = [*self.datasets.values(), *self.held_out.values()]
        return list({dataset.fingerprint: dataset for dataset in every}.values())

    def encoded(self, dataset: Dataset) -> EncodedDataset:
        """A data set whose rows come as units of token ids."""
        config = self.manifest.data[dataset.name]
        encoder = Encoder(
            self.tokenizer,
            template=config.template,
            train_on=config.train_on,
            block=self.config.batch.block,
            truncate=config.truncate,
            today=self.begun,
        )
        return EncodedDataset(dataset, encoder, self.config.units, config.on_bad_record)

    @cached_property
    def sources(self) -> dict[str, EncodedDataset]:
        """The data sets that the stage trains on, encoded."""
        return {name: self.encoded(dataset) for name, dataset in self.datasets.items()}

    @property
    def conversations(self) -> dict[str, EncodedDataset]:
        """Those of the sources whose format makes conversations."""
        return {
            name: source for name, source in self.sources.items() if Conversation in shapes_of(self.manifest.data[name])
        }

    @cached_property
    def loader(self) -> Loader:
        """The exact loader over the stage's mixture, dealing this rank its blocks."""
        return self._loader(self.sources, self.config.data, epochs=self.config.epochs, steps=self.config.steps)

    @cached_property
    def evaluations(self) -> dict[str, list[Block]]:
        """This rank's held-out blocks by data set: one pass over each, packed once."""
        blocks = {}
        for name, dataset in self.held_out.items():
            with self._loader({name: self.encoded(dataset)}, {name: 1.0}, epochs=1, steps=None) as loader:
                blocks[name] = [block for step in loader for block in step.blocks]
        return blocks

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
            rank=self.workers.data_rank,
            world=self.workers.data_world,
            waiting=waiting,
            complete=self._completed,
        )

    def _completed(self, block: Block) -> Block:
        for stored in self.stored:
            block = stored.complete(block)
        return block

    # --- tokenizer ------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The stage's tokenizer, with the tokens that are added to it."""
        return self._tokens[0]

    @property
    def new_tokens(self) -> NewTokens | None:
        """The tokens that the stage adds to those of its model."""
        return self._tokens[1]

    @cached_property
    def _tokens(self) -> tuple[PreTrainedTokenizerBase, NewTokens | None]:
        asked = self.config.add_tokens
        if isinstance(asked, TokensFrom):
            lines = storage.read_text(asked.path).splitlines()
            asked = [line for line in lines if line.strip()]
        if not asked:
            return self._own_tokenizer, None
        return with_new_tokens(self._own_tokenizer, asked)

    @cached_property
    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        """One that is trained is trained once, by the leading rank, and kept in the stage."""
        asked = self.config.tokenizer
        if asked is None:
            return self.tokenizer_of(self.config.model)
        if asked.train is None:
            return load_tokenizer(asked)
        kept = self.stage.tokenizer
        if self.workers.leads and not storage.is_committed(kept):
            with storage.new_folder(kept) as folder, waiting("the tokenizer to be trained"):
                train_tokenizer(asked.train, self._texts()).save_pretrained(folder)
        self.workers.barrier()
        return load_tokenizer(kept)

    @property
    def made_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.finished_tokenizer

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

    def configuration(self, start: ModelPlace) -> PreTrainedConfig:
        """The configuration of a model of the stage, or of what it will be made from; with the stage's new tokens, if
        it is the model that training starts from."""
        root = self.root(start)
        config = configuration(root, self.place_of(root), self.tokenizer)
        return config_with_tokens(config, self.new_tokens) if start == self.config.model else config

    def check_same_tokens(self, name: str, start: ModelPlace) -> None:
        """ManifestError if a model that gets the stage's tokens takes its ids for other tokens."""
        place = self.place_of(start)
        if place is None or (storage.is_local(place) and not has_tokenizer(place) and storage.exists(place)):
            return  # nothing says what its ids mean
        check_same_ids(self.tokenizer, load_tokenizer(place), f"stages.{self.task.stage}.{name} ({place})")

    def model(
        self, start: ModelPlace, mesh: Mesh | None = None, scalar_head: bool = False, adapter: Adapter | None = None
    ) -> LanguageModel:
        """A model on this rank's device, or its part of one, recomputing and compiled as the stage says."""
        place, device = self.place_of(start), self.workers.device
        asked: dict[str, Any] = {"seed": self.manifest.seed, "adapter": None}
        if adapter is not None:
            asked["adapter"] = AdapterRequest(adapter, self.manifest.seed, self._held)
        if start == self.config.model:
            asked["new_tokens"] = self.new_tokens
        if mesh is None:
            model = load_model(start, place, self.tokenizer, **asked).to(device)
        else:
            model = load_divided(start, place, self.tokenizer, mesh=mesh, device=device, scalar=scalar_head, **asked)
        recompute = self.config.recompute
        if isinstance(recompute, str) and recompute != "none":
            model.recompute_layers(recompute)
        if self.config.compile:
            model.compile_layers(1.0 if isinstance(recompute, str) else recompute)
        return model

    def _held(self, stored: torch.dtype) -> torch.dtype:
        """What weights that are not trained are held in: as they are stored, where that is what is computed in."""
        import torch

        computed = Precision.choose(self.config.precision, self.workers.device, stored, self.config.half).dtype
        return stored if stored == computed else torch.float32

    def with_models(self, start: ModelFrom, companions: Mapping[str, ModelPlace]) -> Assembly:
        """The same stage with another model to start from, and others beside it, by name. Records and tokenizer are
        shared, what is counted is not."""
        other = copy(self)
        other.config = self.config.model_copy(update={"model": start})
        other.replaced = dict(companions)
        for built in ("program", "precision", "sources", "loader"):
            other.__dict__.pop(built, None)
        return other

    @cached_property
    def program(self) -> Program:
        """The recipe's objective, and every model that it needs with its heads."""
        objective, adapter = self.config.objective(), self.config.adapter

        def made(start: ModelPlace, name: str, adapter: Adapter | None = None) -> LanguageModel:
            return self.model(start, self.workers.mesh, "scalar" in objective.heads.get(name, ()), adapter)

        policy = made(self.config.model, "policy", adapter)
        roles = {"policy": Role(policy, self.config.optimizer)}  # type: ignore[arg-type]
        for name, companion in self.config.companions().items():
            start = self.replaced.get(name, companion.start)
            self.check_same_tokens(name, start)
            is_base = start == self.config.model and companion.optimizer is None
            if is_base and adapter is not None and not adapter.continue_:
                roles[name] = Role(WithoutAdapter(policy), None)  # type: ignore[arg-type]
            else:
                roles[name] = Role(made(start, name), companion.optimizer)
        for name, heads in objective.heads.items():
            if "scalar" in heads:
                roles[name].model.add_scalar_head()
        for name, role in roles.items():
            trained = role.optimizer is not None
            role.model.make_trainable(trained)
            role.model.train(trained)
            role.model.freeze_heads_except(objective.heads.get(name, ()))
        return Program(objective, roles)

    @cached_property
    def precision(self) -> Precision:
        """The compute dtype, with the reason for it."""
        stored = self.program.roles["policy"].model.stored_dtype
        return Precision.choose(self.config.precision, self.workers.device, stored, self.config.half)

    # --- the trainer ----------------------------------------------------------------------------------------

    def trainer(self, recorder: Recorder, stop: Callable[[bool], bool]) -> Trainer:
        """The trainer, at step 0."""
        models = [role.model for role in self.program.roles.values()]
        heads = self.program.objective.heads
        headless = [role.model for name, role in self.program.roles.items() if "lm" not in heads.get(name, ())]
        return Trainer(
            self.config,
            self.program,
            self.loader,
            self.workers,
            seed=self.manifest.seed,
            precision=self.precision,
            journal=recorder,
            meters=Meters(packed_flops(models, headless), self.workers, self.precision, self.task.threads),
            evaluations=self.evaluations,
            examine=self.examine,
            checkpoint_uri=self.stage.checkpoint_uri,
            on_commit=lambda uri, step: self._committed(recorder, uri, step),
            amendments=Amendments(self.stage),
            stop=stop,
        )

    def examine(self) -> Mapping[str, Mapping[str, float]]:
        """What is measured of the model on held-out data beside the loss, by name."""
        return {}

    def _committed(self, recorder: Recorder, uri: str, step: int) -> None:
        recorder.event("checkpoint_saved", step=step, uri=uri)
        self.stage.prune(self.config.checkpoint.keep)
