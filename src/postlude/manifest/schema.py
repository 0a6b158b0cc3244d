"""The keys of the manifest. What a recipe adds to them stands beside the recipe."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from postlude.manifest.component import Component, Config, Named

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


# --- data ---------------------------------------------------------------------------------------------------


def _source_name(keys: dict[str, Any]) -> str | None:
    """``{path: ...}``, ``{hub: ...}`` and ``{query: ...}`` say by their own key which source they are."""
    return next((name for name in ("path", "hub", "query") if name in keys), None)


class DatasetConfig(Config):
    """A named data set: where its records come from and how each becomes something to train on."""

    source: Annotated[Component, Named("sources", infer=_source_name)]
    format: Annotated[Component, Named("formats")]
    filters: list[str | Annotated[Component, Named("filters")]] = []
    """SQL predicates over the record, and registered filters, in order."""
    key: str | None = None
    """The column that identifies a record; without it the identity is a hash of the record."""
    template: str | None = None
    """A chat template in place of the tokenizer's own: a path that ends in .jinja, or the template itself."""
    train_on: Literal["assistant", "last", "all"] | list[str] = "assistant"
    """Which turns are trained: the assistant's, its last one, everything, or a list of roles."""
    truncate: Literal["right", "left", "drop", "split"] = "right"
    """What happens to an example longer than the block."""
    limit: Positive | None = None
    """Use only so many records, the first ones."""
    on_bad_record: Literal["stop", "skip"] = "stop"


# --- parts of a stage ---------------------------------------------------------------------------------------


class ModelFrom(Config):
    """The model a stage starts from: exactly one of ``path``, ``from`` and ``new``."""

    path: str | None = None
    """A Hugging Face directory, a hub name, or RUN/STAGE."""
    from_: Annotated[str | None, Field(alias="from")] = None
    """The stage of this manifest whose artifact it is."""
    new: NewModel | None = None
    """Random weights in a given shape."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelFrom:
        if sum(value is not None for value in (self.path, self.from_, self.new)) != 1:
            raise ValueError("a model needs exactly one of 'path', 'from' and 'new'")
        return self


class NewModel(Config):
    """A model with random weights."""

    architecture: str
    """The model type as transformers names it: qwen3, llama, gemma3_text, ..."""
    config: dict[str, Any] = {}
    """Keys of the architecture's own configuration; ``vocab_size`` follows the tokenizer where it is not given."""


class TrainTokenizer(Config):
    """A tokenizer trained on the stage's own data."""

    kind: Literal["bpe", "word"] = "bpe"
    """Byte-level BPE, or one token for each piece between separators."""
    vocabulary: Positive = 8192
    separator: str = "\n"
    """Between the pieces of a word tokenizer."""


class TokenizerFrom(Config):
    """The tokenizer, where it is not the model's own: exactly one of ``path``, ``train`` and ``bytes``."""

    path: str | None = None
    train: TrainTokenizer | None = None
    bytes: Literal[True] | None = None
    """One token a byte."""

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerFrom:
        if sum(value is not None for value in (self.path, self.train, self.bytes)) != 1:
            raise ValueError("a tokenizer needs exactly one of 'path', 'train' and 'bytes'")
        return self


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

    every: Positive = 100
    """Optimiser steps between checkpoints; one is written at the end of a stage in any case."""
    keep: Positive = 2
    """How many of the latest checkpoints stay."""
    on_full_disk: Literal["stop", "continue"] = "stop"


class Evaluate(Config):
    """Loss on held-out data."""

    data: dict[str, Annotated[float, Field(gt=0)]]
    """Data set names; the weights are those of a mixture."""
    every: Positive | None = None
    """Optimiser steps between evaluations; without it once before the first step and once after the last."""
    limit: Positive | None = None
    """Use only so many examples of each data set."""


# --- stages -------------------------------------------------------------------------------------------------


class StageConfig(Component):
    """What every stage has. A recipe's config derives from this or from :class:`TrainingStage`."""

    recipe: str


class TrainingStage(StageConfig):
    """A stage that trains a model: the keys that belong to the trainer, whatever the recipe."""

    amendable: ClassVar[tuple[str, ...]] = (
        "optimizer.lr",
        "optimizer.weight_decay",
        "max_grad_norm",
        "checkpoint.every",
        "evaluate.every",
    )
    """Keys that ``postlude amend`` may change while the stage runs."""
    free: ClassVar[tuple[str, ...]] = ("checkpoint",)
    """Keys that cannot change the result: a run may go on with other values."""

    model: ModelFrom
    tokenizer: TokenizerFrom | None = None
    data: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Data set names with their weights in the mixture."""
    steps: Positive | None = None
    epochs: Positive | None = None
    batch: Batch = Batch()
    optimizer: Annotated[Component, Named("optimizers"), Field(validate_default=True)] = "adamw"  # type: ignore
    schedule: Annotated[Component, Named("schedules"), Field(validate_default=True)] = "cosine"  # type: ignore
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    threads: Positive | None = None
    """CPU threads of each worker; by default the machine's cores, shared out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    recompute: Literal["none", "layer"] = "none"
    compile: bool = False
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate | None = None
    max_skipped_steps: Positive = 5
    """So many steps in a row without a finite gradient stop the run."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingStage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a training stage needs exactly one of 'steps' and 'epochs'")
        return self


# --- the whole ----------------------------------------------------------------------------------------------


class Pool(Config):
    """Workers of one role."""

    workers: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Positive | None = None


class Compute(Config):
    """Where the processes run."""

    provider: Literal["local"] = "local"
    pools: dict[str, Pool] = {}


class Manifest(Config):
    """A resolved manifest: ``defaults`` have been folded into the stages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: int = 0
    run_dir: str = "runs"
    plugins: list[str] = []
    """Modules to import: they register components of the user's own."""
    data: dict[str, DatasetConfig] = {}
    compute: Compute = Compute()
    sinks: list[Annotated[Component, Named("sinks")]] = []
    """Where metrics and events go besides the run directory."""
    stages: Annotated[dict[str, Annotated[StageConfig, Named("recipes", key="recipe")]], Field(min_length=1)]


ModelFrom.model_rebuild()
