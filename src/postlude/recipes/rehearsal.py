"""The last part of a preflight: what a stage will weigh, and one real optimiser step of it, small.

The plan counts the parameters of the whole model without allocating them. The step runs the stage's own data,
objective, optimiser and precision through the unmodified trainer, on a model of the same architecture and
vocabulary with random weights and at most two layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from postlude.data.loader import StepBlocks
from postlude.manifest.errors import UserError
from postlude.manifest.schema import ModelFrom, ModelPlace
from postlude.model.load import configuration, count_parameters
from postlude.recipes.annotate import annotated, check_annotations
from postlude.recipes.assembly import Assembly
from postlude.recipes.little import LARGEST_PARAMETERS, little_model
from postlude.training.meters import Meters
from postlude.training.precision import Precision
from postlude.training.trainer import Trainer


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker, estimated: weights, gradients and optimiser state exactly, activations roughly."""

    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    def to_json(self) -> dict[str, int]:
        return {**vars(self), "peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal of a stage found."""

    plan: MemoryPlan
    precision: Precision
    loss: float | None
    """Of the small step; None if it was not made."""
    grad_norm: float | None
    expected_loss: float
    """What a model that knows nothing has: the logarithm of the vocabulary."""

    def to_json(self) -> dict[str, Any]:
        return {
            "memory": self.plan.to_json(),
            "precision": vars(self.precision),
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "log_vocabulary": self.expected_loss,
        }

    def render(self) -> Table:
        table = Table(title="One worker", title_justify="left", show_header=False)
        table.add_row("parameters", f"{self.plan.parameters:,}")
        for part in ("weights", "gradients", "optimizer", "activations", "peak"):
            table.add_row(part, f"{getattr(self.plan, f'{part}_bytes') / 2**20:,.0f} MiB")
        table.add_row("precision", f"{self.precision.name} ({self.precision.reason})")
        step = "not made: the model is too large for this machine"
        if self.loss is not None:
            step = f"loss {self.loss:.3f} (chance: {self.expected_loss:.3f}), gradient norm {self.grad_norm:.3g}"
        table.add_row("one small step", step)
        return table


def rehearse(assembly: Assembly) -> Rehearsal:
    """Plan a stage's memory and make one small step of it. UserError if the step's loss or gradient is not finite."""
    check_annotations(assembly)
    companions = {name: one.start for name, one in assembly.config.companions().items()}
    companions |= {name: one.start for name, one in assembly.config.annotations().items()}
    start = assembly.root(assembly.config.model)
    config = configuration(start, assembly.place_of(start), assembly.tokenizer)
    plan = _plan(assembly, config, count_parameters(config))
    new = little_model(config)
    beside = {name: _companion(assembly, name, place) for name, place in companions.items()}
    little = assembly.with_models(new, beside)
    sizes = [count_parameters(configuration(one, None, assembly.tokenizer)) for one in (new, *beside.values())]
    fits = sum(sizes) <= LARGEST_PARAMETERS
    precision = Precision.choose(assembly.config.precision, assembly.workers.device, None)
    chance = math.log(config.get_text_config().vocab_size)
    if not fits:
        return Rehearsal(plan, precision, None, None, chance)
    line = _one_step(little)
    if not all(math.isfinite(line[name]) for name in ("loss", "grad_norm")):
        raise UserError(
            f"stages.{assembly.task.stage}: one step on a small random model of this architecture gave loss "
            f"{line['loss']} and gradient norm {line['grad_norm']}. Look at precision and at the weights in the data."
        )
    return Rehearsal(plan, little.precision, line["loss"], line["grad_norm"], chance)


class _Listener:
    """A journal that keeps the last line of metrics."""

    def __init__(self) -> None:
        self.line: dict[str, Any] = {}

    def metrics(self, line: Mapping[str, Any]) -> None:
        self.line = dict(line)

    def examples(self, step: int, epoch: int, rows: Sequence[tuple[str, str, float, int]]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def flush(self) -> None: ...


def _one_step(assembly: Assembly) -> dict[str, Any]:
    """The metrics of one step on the first block."""
    listener = _Listener()
    trainer = Trainer(
        assembly.config.model_copy(update={"evaluate": None}),
        assembly.program,
        assembly.loader,
        assembly.workers,
        seed=assembly.manifest.seed,
        precision=assembly.precision,
        journal=listener,
        meters=Meters(None, assembly.workers, assembly.precision, assembly.task.threads),
    )
    with assembly.loader as loader:
        work = next(iter(loader))
    blocks = [annotated(assembly, block) for block in work.blocks[:1]]
    trainer.train(StepBlocks(blocks, work.epoch, work.progress, work.documents, work.tokens))
    trainer.checkpointer.close()
    return listener.line


def _companion(assembly: Assembly, name: str, start: ModelPlace) -> ModelFrom:
    """What stands in for a model beside the one that is trained. ManifestError if its tokens are others."""
    root = assembly.root(start)
    if assembly.place_of(root) is not None:
        assembly.check_same_tokens(name, root)
    return little_model(configuration(root, assembly.place_of(root), assembly.tokenizer))


def _plan(assembly: Assembly, config: Any, parameters: int) -> MemoryPlan:
    text = config.get_text_config()
    batch = assembly.config.batch
    hidden, heads = text.hidden_size, text.num_attention_heads
    key_value = hidden * (getattr(text, "num_key_value_heads", None) or heads) // heads
    feed_forward = getattr(text, "intermediate_size", None) or 4 * hidden
    per_layer = 8 * hidden + 2 * key_value + 4 * feed_forward
    kept = text.num_hidden_layers * (hidden if assembly.config.recompute == "layer" else per_layer)
    width = 4 if assembly.config.precision in ("auto", "fp32") and assembly.workers.device.type == "cpu" else 2
    states = assembly.config.optimizer.state_per_parameter  # type: ignore[attr-defined]
    return MemoryPlan(
        parameters=parameters,
        weights_bytes=4 * parameters,
        gradients_bytes=4 * parameters,
        optimizer_bytes=4 * states * parameters,
        activations_bytes=width * (batch.micro or batch.block) * (kept + per_layer),
    )
