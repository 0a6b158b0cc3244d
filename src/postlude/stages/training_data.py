"""What a stage trains on, and the tokenizer that turns it into token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from postlude import storage
from postlude.data.annotations import StoredStreams
from postlude.data.dataset import Dataset
from postlude.data.document import Block
from postlude.data.encode import Encoder
from postlude.data.encoded_dataset import EncodedDataset
from postlude.data.example import Conversation, Judged, Ranked, texts_of
from postlude.data.loader import Loader
from postlude.data.tokenizer import (
    NewTokens,
    check_same_ids,
    has_tokenizer,
    load_tokenizer,
    train_tokenizer,
    with_new_tokens,
)
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelPlace, TokensFrom
from postlude.recipes.recipe import TrainingRecipe
from postlude.stages.parts import Parts, shapes_of
from postlude.telemetry.progress import waiting


class TrainingData:
    """The data sets of a stage that trains, as one rank reads them."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config = parts, parts.config_of(TrainingRecipe)

    # --- records --------------------------------------------------------------------------------------------

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        """The data sets that the stage trains on. ManifestError if the recipe cannot train on their format."""
        return {name: self.parts.dataset(name, self.config.accepts) for name in self.config.data}

    @cached_property
    def held_out(self) -> dict[str, Dataset]:
        """The data sets that the stage is evaluated on."""
        evaluate = self.config.evaluate
        if evaluate is None:
            return {}
        return {name: self.parts.dataset(name, self.config.accepts, evaluate.limit) for name in evaluate.data}

    @property
    def all_datasets(self) -> list[Dataset]:
        """Every data set that the stage reads, once."""
        every = [*self.datasets.values(), *self.held_out.values()]
        return list({dataset.fingerprint: dataset for dataset in every}.values())

    # --- blocks ---------------------------------------------------------------------------------------------

    def encoded(self, dataset: Dataset) -> EncodedDataset:
        """A data set whose rows come as units of token ids."""
        config = self.parts.manifest.data[dataset.name]
        encoder = Encoder(
            self.tokenizer,
            template=config.template,
            train_on=config.train_on,
            block=self.config.batch.block,
            truncate=config.truncate,
            today=self.parts.today,
            drop_unprinted=config.drop_unprinted or (),
            apart=config.tokenize == "apart",
        )
        return EncodedDataset(dataset, encoder, self.config.units, config.on_bad_record)

    @cached_property
    def sources(self) -> dict[str, EncodedDataset]:
        """The data sets that the stage trains on, encoded."""
        return {name: self.encoded(dataset) for name, dataset in self.datasets.items()}

    @cached_property
    def held_out_sources(self) -> dict[str, EncodedDataset]:
        """The data sets that the stage is evaluated on, encoded."""
        return {name: self.encoded(dataset) for name, dataset in self.held_out.items()}

    @property
    def conversations(self) -> dict[str, EncodedDataset]:
        """Those of the sources whose format makes conversations, or answers that may be."""
        return {
            name: source
            for name, source in self.sources.items()
            if {Conversation, Ranked, Judged} & set(shapes_of(self.parts.manifest.data[name]))
        }

    def loader(self, stored: Sequence[StoredStreams] = ()) -> Loader:
        """The exact loader over the stage's mixture, dealing this rank its blocks. ``stored`` is what frozen models
        said of the data beforehand, which is added to them."""
        return self._loader(
            self.sources, self.config.data, epochs=self.config.epochs, steps=self.config.steps, stored=stored
        )

    def evaluations(self, stored: Sequence[StoredStreams] = ()) -> dict[str, list[Block]]:
        """This rank's held-out blocks by data set: one pass over each, packed once."""
        blocks = {}
        for name, source in self.held_out_sources.items():
            one_pass = self._loader({name: source}, {name: 1.0}, epochs=1, steps=None, stored=stored)
            with one_pass as loader:
                blocks[name] = [block for step in loader for block in step.blocks]
        return blocks

    def _loader(
        self,
        sources: Mapping[str, EncodedDataset],
        weights: Mapping[str, float],
        *,
        epochs: int | None,
        steps: int | None,
        stored: Sequence[StoredStreams],
    ) -> Loader:
        def complete(block: Block) -> Block:
            for streams in stored:
                block = streams.complete(block)
            return block

        batch, workers = self.config.batch, self.parts.workers
        return Loader(
            sources,
            weights,
            seed=self.parts.manifest.seed,
            block=batch.block,
            blocks_per_step=batch.tokens // batch.block,
            window=batch.window,
            epochs=epochs,
            steps=steps,
            rank=workers.data_rank,
            world=workers.data_world,
            waiting=waiting,
            complete=complete,
        )

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
        added = self.config.add_tokens
        if isinstance(added, TokensFrom):
            lines = storage.read_text(added.path).splitlines()
            added = [line for line in lines if line.strip()]
        if not added:
            return self._own_tokenizer(), None
        return with_new_tokens(self._own_tokenizer(), added)

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        """One that is trained is trained once, by the leading rank, and kept in the stage."""
        choice, parts = self.config.tokenizer, self.parts
        if choice is None:
            return parts.tokenizer_of(self.config.model)
        if choice.train is None:
            parts.trust(choice, choice.path or "")
            return load_tokenizer(choice)
        kept = parts.stage.tokenizer
        if parts.workers.leads and not _is_whole(kept):
            with storage.new_folder(kept) as folder, waiting("the tokenizer to be trained"):
                train_tokenizer(choice.train, self._texts()).save_pretrained(folder)
        parts.workers.barrier()
        return load_tokenizer(kept)

    def _texts(self) -> Iterator[str]:
        for dataset in self.datasets.values():
            for group, rows in enumerate(dataset.groups):
                for start in range(0, rows, 1024):
                    for examples in dataset.examples(group, range(start, min(start + 1024, rows))):
                        for _, example in examples:
                            yield from texts_of(example)

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the artifact: with the template that the conversations were rendered with, if it is one, or
        that of the data set that ``artifact_template`` names; else with its own."""
        templates = {name: source.encoder.given_template for name, source in self._rendered.items()}
        chosen = self.config.artifact_template
        every = set(templates.values()) if chosen is None else {templates.get(chosen)}
        template = every.pop() if len(every) == 1 else None
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer

    @cached_property
    def _rendered(self) -> dict[str, EncodedDataset]:
        """Those of the sources that hold conversations, which a template renders."""
        return {name: source for name, source in self.conversations.items() if source.has_conversations}

    def check_template(self) -> None:
        """ManifestError if conversations are rendered with several templates and nothing says which is the
        artifact's."""
        chosen, key = self.config.artifact_template, f"stages.{self.parts.task.stage}.artifact_template"
        if chosen is not None and chosen not in self._rendered:
            raise ManifestError(
                f"{key} is '{chosen}', which is no data set of conversations of this stage. Choose among: "
                f"{', '.join(self._rendered) or 'none'}."
            )
        used = {name: source.encoder.rendered_with for name, source in self._rendered.items()}
        if chosen is None and len(set(used.values())) > 1:
            own = [name for name, source in self._rendered.items() if source.encoder.given_template is None]
            which = f" ({', '.join(own)} with the tokenizer's own)" if own else ""
            raise ManifestError(
                f"The data sets {', '.join(used)} are rendered with different chat templates{which}, and the artifact "
                f"has one. Set {key} to the data set whose template it is to have, or give all of them one template."
            )

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer in what was trained on."""
        return sorted({stop for source in self.conversations.values() for stop in source.encoder.stop_ids})

    def check_same_tokens(self, name: str, start: ModelPlace) -> None:
        """ManifestError if a model that gets the stage's tokens takes its ids for other tokens."""
        place = self.parts.place_of(start)
        if place is None or (storage.is_local(place) and not has_tokenizer(place) and storage.exists(place)):
            return  # nothing says what its ids mean
        check_same_ids(self.tokenizer, load_tokenizer(place), f"stages.{self.parts.task.stage}.{name} ({place})")


def _is_whole(uri: str) -> bool:
    try:
        storage.verify(uri)
    except (storage.CorruptError, storage.NotFound):
        return False
    return True
