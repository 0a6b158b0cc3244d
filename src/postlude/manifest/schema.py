"""The keys of the manifest. What a recipe adds to them stands beside the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from postlude.manifest.adapter import Adapter
from postlude.manifest.alarms import AlarmRule, Receiver
from postlude.manifest.change import Change, from_step, never
from postlude.manifest.component import Component, Config, Name, Named, Positive, Seed, default_name
from postlude.manifest.compute import Compute, Parallel
from postlude.manifest.starter import StarterFiles
from postlude.manifest.storage import Places


class NamesDatasets:
    """Annotation of a mapping whose keys name data sets. It is inherited whole or not at all: a stage that
    names data sets does not want those of the defaults as well."""


Mixture = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1), NamesDatasets()]
"""Data set names with their weights."""


# --- data ---------------------------------------------------------------------------------------------------


def _source_name(keys: Mapping[str, Any]) -> str | None:
    """``{path: ...}``, ``{hub: ...}``, ``{query: ...}`` and ``{from: ...}`` say by a key which source they are."""
    return next((name for name in ("path", "hub", "query", "from") if name in keys), None)


Turns = Literal["assistant", "last", "all"] | list[str]
"""The assistant's turns, its last one, everything, or those of a list of roles."""


class TrainOnSpans(Config):
    """Only stretches of some turns: what a regular expression finds in them."""

    turns: Turns = "assistant"
    """Which turns are looked at: the assistant's, its last one, everything, or a list of roles."""
    spans: str
    """A regular expression (Python's, the dot matches line ends, too). It is searched in the text of each turn as the
    template writes it, the stop token included: what it matches is trained or, where it has groups, what they match."""

    @field_validator("spans")
    @classmethod
    def _is_an_expression(cls, spans: str) -> str:
        try:
            re.compile(spans)
        except re.error as error:
            raise ValueError(f"this is no regular expression: {error}") from error
        return spans


Unprinted = Literal[
    "reasoning", "tool_calls", "tools", "names", "system", "developer", "user", "assistant", "tool", "other"
]
"""What a chat template may leave out of a conversation: what was thought, calls, descriptions of tools, names of
speakers, and what messages of a role say."""


class DatasetConfig(Config):
    """A named data set: where its records come from and how each becomes something to train on."""

    free: ClassVar[tuple[str, ...]] = ("drop_unprinted",)
    """Keys that change no token: a run may go on with other values."""
    later = ("tokenize",)

    source: Annotated[Component, Named("sources", infer=_source_name)]
    """Where the records are: ``path``, ``hub``, ``query`` or ``from`` says which kind of source it is."""
    format: Annotated[Component, Named("formats")]
    """How a record is read as an example."""
    filters: list[str | Annotated[Component, Named("filters")]] = []
    """SQL predicates over the record, and registered filters, in order."""
    key: str | None = None
    """The column that identifies a record; without it the identity is a hash of the record."""
    template: str | None = None
    """A chat template in place of the tokenizer's own: a path that ends in .jinja, or the template itself."""
    train_on: Turns | TrainOnSpans = "assistant"
    """What is trained of a conversation: the assistant's turns, its last one, everything, the turns of a list of roles;
    or of such turns only what a regular expression finds: ``{turns: last, spans: '<answer>.*</answer>'}``."""
    truncate: Literal["right", "left", "drop", "split"] = "right"
    """What happens to an example longer than the block."""
    limit: Positive | None = None
    """Use only so many records, the first ones."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be read stops the run, or is skipped and counted."""
    drop_unprinted: list[Unprinted] | None = None
    """What the chat template may leave out of trained turns, and of the rest without a word: ``[reasoning]``. By
    default a trained turn that loses something stops the run."""
    tokenize: Literal["together", "apart"] | None = None
    """``apart``: what comes before the last answer is tokenised by itself, so that in training it has the tokens that
    it has when it is asked, whatever it ends with. By default ``together``."""


# --- parts of a stage ---------------------------------------------------------------------------------------


class NewModel(Config):
    """A model with random weights."""

    architecture: str
    """The model type as transformers names it: qwen3, llama, gemma3_text, ..."""
    config: dict[str, Any] = {}
    """Keys of the architecture's own configuration; ``vocab_size`` follows the tokenizer where it is not given."""


class ModelPlace(Config):
    """A model that is there, or will be: exactly one of ``path`` and ``from``."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("path", "from"),)
    later = ("trust_remote_code",)

    path: str | None = None
    """A Hugging Face directory, a hub name, or RUN/STAGE."""
    from_: Annotated[str | None, Field(alias="from")] = None
    """The stage of this manifest whose artifact it is."""
    trust_remote_code: Literal[True] | None = None
    """Run the Python code that the model brings along, with all that the run may do. Read it before: its digest is kept
    with the stage, and other code is another model."""


class ModelFrom(ModelPlace):
    """The model a stage starts from: exactly one of ``path``, ``from`` and ``new``."""

    exactly_one = (("path", "from", "new"),)

    new: NewModel | None = None
    """Random weights in a given shape."""


class TrainTokenizer(Config):
    """A tokenizer trained on the stage's own data."""

    kind: Literal["bpe", "word"] = "bpe"
    """Byte-level BPE, or one token for each piece between separators."""
    vocabulary: Positive = 8192
    """How many tokens there are at most."""
    separator: str = "\n"
    """Between the pieces of a word tokenizer."""


class TokensFrom(Config):
    """Tokens in a file."""

    path: str
    """One token a line, as it is written."""


class TokenizerFrom(Config):
    """The tokenizer, where it is not the model's own: exactly one of ``path``, ``train`` and ``bytes``."""

    exactly_one = (("path", "train", "bytes"),)
    later = ("trust_remote_code",)

    path: str | None = None
    """A Hugging Face directory or a hub name."""
    trust_remote_code: Literal[True] | None = None
    """Run the Python code that the tokenizer brings along, as for a model."""
    train: TrainTokenizer | None = None
    """Made from the stage's own data before it starts."""
    bytes: Literal[True] | None = None
    """One token a byte."""


class Batch(Config):
    """How many tokens make an optimiser step, and how they are packed."""

    tokens: Positive = 65536
    """Tokens of one optimiser step, over all workers."""
    block: Positive = 8192
    """Tokens of one packed block: the longest example that is not truncated."""
    micro: Positive | None = None
    """Tokens of one forward pass on one worker; by default one block."""
    window: Positive = 128
    """How many blocks' worth of examples are packed together."""

    @model_validator(mode="after")
    def _whole_blocks(self) -> Batch:
        if self.tokens % self.block:
            raise ValueError(f"tokens ({self.tokens}) must be a multiple of block ({self.block})")
        if self.micro is not None and self.micro % self.block:
            raise ValueError(f"micro ({self.micro}) must be a multiple of block ({self.block})")
        return self


class Checkpoint(Config):
    """When the state is saved, and how much of it is kept."""

    changes: ClassVar[Mapping[str, Change]] = {
        "every": from_step("a checkpoint is written after each step that it divides"),
        "keep": from_step("so many stay when the next one is written"),
        "on_full_disk": from_step("it says what the next one for which there is no room does"),
    }

    every: Positive = 100
    """Optimiser steps between checkpoints; one is written at the end of a stage in any case."""
    keep: Positive = 2
    """How many of the latest checkpoints stay."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """What a checkpoint for which there is no room does to the stage; the last one survives either way."""


class Evaluate(Config):
    """Loss on held-out data."""

    changes: ClassVar[Mapping[str, Change]] = {
        "every": from_step("what is held out is measured after each step that it divides")
    }

    data: Mixture
    """Data set names; the weights are those of a mixture."""
    every: Positive | None = None
    """Optimiser steps between evaluations; without it once before the first step and once after the last."""
    limit: Positive | None = None
    """Use only so many examples of each data set."""


# --- stages -------------------------------------------------------------------------------------------------


class StageConfig(Component):
    """What every stage has. A recipe's config derives from this or from :class:`TrainingStage`."""

    version: ClassVar[int] = 1
    """Raised when the recipe's result changes although its keys do not: what it made before is then made anew."""
    pool_keys: ClassVar[tuple[str, ...]] = ("pool",)
    """The keys, dotted, that name pools of ``compute.pools`` whose workers it uses; the one it runs on comes first."""
    changes: ClassVar[Mapping[str, Change]] = {
        "recipe": never("it is what the stage is"),
        "pool": never("its processes run there"),
    }
    free: ClassVar[tuple[str, ...]] = ()
    """Keys that cannot change the result: a run may go on with other values."""
    does: ClassVar[str]
    """What works on such a stage, as ``package.module:name``: a class or function that makes a
    :class:`postlude.stages.stage.Stage` from the stage's parts. Its name alone, since it loads torch."""
    starter: ClassVar[StarterFiles | None] = None
    """The manifest to start from, for ``postlude init``."""

    recipe: str
    """What the stage does, by the name of its recipe."""
    pool: Name | None = None
    """The pool of ``compute.pools`` whose workers it runs on. Stages that do not need each other run at the same time
    where their pools differ."""

    @property
    def all_pools(self) -> tuple[str, ...]:
        """Every pool whose workers it uses, its own first."""
        named = (attrgetter(key)(self) for key in self.pool_keys)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def base_model(self) -> ModelPlace | None:
        """The model whose architecture and tokenizer the model has that the stage makes; None if it makes none."""
        return None

    def rehearsed(self) -> Self:
        """The same with so little of everything that a preflight can try it."""
        return self

    def objection(self, begun: Self, key: str) -> str | None:
        """Why a stage that began as another cannot go on as this one, which an amendment of a key made of it."""
        return None


class TrainingStage(StageConfig):
    """A stage that trains a model: the keys that belong to the trainer, whatever the recipe."""

    exactly_one = (("steps", "epochs"),)
    changes = {
        "model": never("training has begun with its weights"),
        "adapter": never("its matrices are what is trained"),
        "tokenizer": never("the data are encoded with it"),
        "artifact_template": never("the artifact has it: run a stage after this one to change it"),
        "add_tokens": never("the model has their rows since training began"),
        "data": from_step("the weights hold for what is packed after the window in progress"),
        "steps": never("the schedule and the share that is done follow from it: go on in a stage after this one"),
        "epochs": never("the schedule and the share that is done follow from it: go on in a stage after this one"),
        "batch": never("the order of the data follows from it"),
        "optimizer": never("its state was made for it"),
        "schedule": from_step("the rate of each step follows from it, and from how far the stage is"),
        "max_grad_norm": from_step("gradients are clipped to it"),
        "threads": never("processes have theirs since they started"),
        "precision": never("the models are held for it"),
        "parallel": never("workers hold their parts of the model: another value may be given to a resume"),
        "recompute": never("the models were built for it"),
        "compile": never("the models were built for it"),
        "checkpoint": from_step("checkpoints are written as it says"),
        "evaluate": never("what is held out is read before the first step"),
        "max_skipped_steps": from_step("so many stop the run"),
        "alarms": from_step("its numbers are held against them"),
    }
    free: ClassVar[tuple[str, ...]] = ("checkpoint", "parallel", "alarms")
    later = ("artifact_template", "alarms")

    pool: Name = "train"
    """The pool of ``compute.pools`` whose workers train it. Stages that do not need each other run at the same time
    where their pools differ."""
    model: ModelFrom
    """The weights that training starts from."""
    adapter: Adapter | None = None
    """Train a few small matrices beside the weights, which stay as they are."""
    tokenizer: TokenizerFrom | None = None
    """By default the model's own."""
    artifact_template: Name | None = None
    """The data set whose chat template the artifact has, where several were given."""
    add_tokens: list[str] | TokensFrom = []
    """Tokens that the tokenizer does not have yet (names of things, semantic ids): each becomes one, whose row in the
    embedding and the head begins as the mean of those of its pieces. A list, or ``{path: FILE}`` with one a line."""
    data: Mixture
    """Data set names with their weights in the mixture."""
    steps: Positive | None = None
    """How long: so many optimiser steps."""
    epochs: Positive | None = None
    """How long: so many passes over the largest data set by weight."""
    batch: Batch = Batch()
    """How many tokens make an optimiser step, and how they are packed."""
    optimizer: Annotated[Component, Named("optimizers", default="adamw")] = default_name("adamw")
    """How gradients change the weights."""
    schedule: Annotated[Component, Named("schedules", default="cosine")] = default_name("cosine")
    """How the learning rate changes over the stage."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients with a larger norm are scaled down to it; null for no limit."""
    threads: Positive | None = None
    """CPU threads of each worker; by default the machine's cores, shared out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What matrices are multiplied in; master weights and sums are fp32 in any case. ``auto`` is fp32 on a CPU; on
    CUDA fp16 with dynamic loss scaling, but bf16 for a checkpoint that is stored in it."""
    parallel: Parallel = Parallel()
    """How the workers hold the model together."""
    recompute: Literal["none", "selective", "layer"] | Annotated[float, Field(ge=0, le=1)] = "none"
    """What is computed again in the backward pass, to save memory: ``layer`` all of each layer, ``selective`` all but
    matrix products and attention, which take most of the time. With ``compile`` also a number: the share of what would
    be kept without, between 0 and 1; the compiler then finds what costs the least time to compute again."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    evaluate: Evaluate | None = None
    """Loss on held-out data, if it is wanted."""
    max_skipped_steps: Positive = 5
    """So many steps in a row without a finite gradient stop the run."""
    alarms: list[AlarmRule] | None = None
    """Rules for alarms of this stage, beside those of the manifest; one with a name that is known replaces that."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not isinstance(self.recompute, str) and not self.compile:
            raise ValueError(
                "recompute: a share of the memory is kept by compiled layers. Set 'compile: true', or choose "
                "'selective' or 'layer'"
            )
        if self.compile and self.parallel.divides:
            raise ValueError(
                "compile: layers that workers hold together are not compiled. Leave compile or parallel out"
            )
        if self.adapter is not None and self.add_tokens:
            raise ValueError(
                "add_tokens: their rows are in the embedding, which an adapter leaves as it is. Train the whole model "
                "with add_tokens first, and the adapter on that"
            )
        if self.adapter is not None and self.model.new is not None:
            raise ValueError("adapter: a new model has nothing to adapt. Leave adapter out, or start from a model")
        if self.adapter is not None and self.adapter.base is not None and (self.parallel.divides or self.compile):
            raise ValueError(
                "adapter.base: packed weights are neither divided among workers nor compiled. Leave base out, or "
                "parallel and compile"
            )
        return self

    def base_model(self) -> ModelPlace | None:
        return self.model

    def objection(self, begun: Self, key: str) -> str | None:
        if self.data.keys() != begun.data.keys():
            return f"the data sets of the mixture stay {', '.join(begun.data)}: only their weights may change"
        largest, every = max(begun.data.values()), sum(self.data.values())
        if starved := [name for name in self.data if begun.data[name] == largest and self.data[name] < 0.01 * every]:
            return (
                f"an epoch is a pass over the data set that was largest by weight, and of '{starved[0]}' less than a "
                "hundredth would be drawn: it would hardly end"
            )
        return super().objection(begun, key)


# --- the whole ----------------------------------------------------------------------------------------------


def _day(text: str | None) -> str | None:
    if text is not None:
        try:
            exact = date.fromisoformat(text).isoformat() == text
        except ValueError:
            exact = False
        if not exact:
            raise PydanticCustomError("day", "it is no day; write one as 2026-01-31")
    return text


class Manifest(Config):
    """A resolved manifest: ``defaults`` have been folded into the stages."""

    later = ("alarms", "notify", "storage")
    changes = {
        "name": never("the run has it"),
        "seed": never("the order of the data and every sample follow from it"),
        "run_dir": never("the run stands there"),
        "plugins": never("they are imported when a process starts"),
        "today": never("the data are rendered with it"),
        "data": never("the data are read as it says: the weights of a mixture are keys of the stage"),
        "compute": never("its processes have started there"),
        "sinks": never("they are opened when a stage starts: others may be given to a resume"),
        "alarms": never("they are read when a stage starts: a stage's own may be amended, and a resume given others"),
        "notify": never("they are read when a run starts: others may be given to a resume"),
        "storage": never("processes have the rules since they started: others may be given to a resume"),
        "stages": never("what a stage says of a key holds for it"),
    }

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Of the run: the folder in ``run_dir`` that holds it."""
    seed: Seed = 0
    """What every random choice of the run follows from."""
    run_dir: str = "runs"
    """The folder of runs: a local path or a URI such as s3://bucket/prefix."""
    plugins: list[str] = []
    """Modules to import: they register components of the user's own."""
    today: Annotated[str | None, AfterValidator(_day)] = None
    """What day a chat template is told that writes the date, as 2026-01-31. By default the day on which the stage
    first ran."""
    data: dict[Name, DatasetConfig] = {}
    """The data sets by name."""
    compute: Compute = Field(default_factory=Compute)
    """Where the processes run."""
    sinks: list[Annotated[Component, Named("sinks")]] = []
    """Where metrics and events go besides the run directory."""
    alarms: list[AlarmRule] | None = None
    """Rules for alarms, beside those that hold by default; one with the name of a default rule changes that."""
    notify: list[Receiver] | None = None
    """Who is told of alarms as they come."""
    stages: Annotated[dict[Name, Annotated[StageConfig, Named("recipes", key="recipe")]], Field(min_length=1)]
    """What is to be done, by name. Which stage waits for which follows from ``{from: STAGE}`` wherever it stands."""
    storage: Places | None = None
    """What places need, by the longest prefix that fits: ``{"s3://company-data/": {role: ARN, read_only: true}}``."""
