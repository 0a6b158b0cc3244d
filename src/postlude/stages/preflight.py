"""The last part of a preflight: what a stage will weigh, and one real optimiser step of it, small.

The plan (:mod:`postlude.model.memory`) is that of the whole model, which is never allocated. The step runs the
stage's own data, objective, optimiser and precision through the unmodified trainer, on a model of the same
architecture and vocabulary with random weights and at most two layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from postlude.data.loader import StepBlocks
from postlude.errors import ComputeError, UserError
from postlude.manifest.adapter import Adapter
from postlude.manifest.compute import Pool
from postlude.manifest.parallel import shape_of
from postlude.manifest.schema import ModelFrom, ModelPlace
from postlude.model import memory, sharded, tensor_parallel, vocabulary
from postlude.model.load import configuration, count_parameters
from postlude.model.memory import MIB, MemoryPlan
from postlude.objectives.logits import Limits
from postlude.stages.annotate import annotated, check_annotations
from postlude.stages.little import LARGEST_PARAMETERS, little_model
from postlude.stages.training import Assembly
from postlude.telemetry import hardware
from postlude.training.meters import Meters
from postlude.training.precision import Precision
from postlude.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        if self.plan.trained != self.plan.parameters:
            table.add_row("trained", f"{self.plan.trained:,}")
        for part in (
            "base",
            "weights",
            "gathered",
            "gradients",
            "optimizer",
            "activations",
            "head",
            "checkpoint",
            "peak",
        ):
            if size := getattr(self.plan, f"{part}_bytes"):
                table.add_row(part, f"{size / MIB:,.0f} MiB")
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
    config = assembly.configuration(assembly.config.model)
    check_mesh(assembly, config)
    plan = plan_of(assembly, config)
    _check_fits(assembly, config, plan)
    new = little_model(config)
    beside = {name: _companion(assembly, name, place) for name, place in companions.items()}
    little = assembly.with_models(new, beside)
    sizes = [count_parameters(configuration(one, None, assembly.tokenizer)) for one in (new, *beside.values())]
    fits = sum(sizes) <= LARGEST_PARAMETERS
    precision = Precision.choose(assembly.config.precision, assembly.workers.device, None, assembly.config.half)
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
    return little_model(assembly.configuration(start))


# --- memory ---------------------------------------------------------------------------------------------------


def plan_of(assembly: Assembly, config: PreTrainedConfig) -> MemoryPlan:
    """What one worker of the stage will need."""
    return memory.plan(config, _setting(assembly, config), _base_bytes(assembly))


def check_memory(assembly: Assembly) -> None:
    """:class:`ComputeError` if the manifest says what memory a worker has, and by the plan it is not enough."""
    if _limit(assembly) is not None:
        config = assembly.configuration(assembly.config.model)
        _check_fits(assembly, config, plan_of(assembly, config))


def _check_fits(assembly: Assembly, config: PreTrainedConfig, plan: MemoryPlan) -> None:
    limit = _limit(assembly)
    if limit is None or plan.peak_bytes <= limit:
        return
    setting, base = _setting(assembly, config), _base_bytes(assembly)
    fits = memory.what_fits(config, setting, _pool(assembly).most, limit, base)
    advice = (
        f"Any of these would fit: {'; '.join(fits)}."
        if fits
        else (
            "No single setting would make it fit: take more workers with 'parallel: {shard: true}', or a smaller model."
        )
    )
    raise ComputeError(
        f"stages.{assembly.task.stage}: by the memory plan a worker needs {plan.peak_bytes / MIB:,.0f} MiB at its "
        f"peak, and the pool '{assembly.config.pool}' gives each {limit / MIB:,.0f} MiB. {advice}"
    )


def check_mesh(assembly: Assembly, config: PreTrainedConfig) -> None:
    """ManifestError if the model cannot be divided among the workers in the way that the stage asks for."""
    shape = shape_of(assembly.config.parallel, _pool(assembly).most)
    if shape is None or shape.tensor == 1:
        return
    causal = sharded.on_meta(config)
    vocabulary.pad(causal)
    tensor_parallel.check_divides(causal, shape.tensor)


def _setting(assembly: Assembly, config: PreTrainedConfig) -> memory.Setting:
    stage, pool = assembly.config, _pool(assembly)
    device = torch.device("cuda" if pool.gpus_per_worker else "cpu")
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    beside = [one for one in stage.companions().values() if not (stage.adapter and one.start == stage.model)]
    every = stage.checkpoint.every
    return memory.Setting(
        tokens=stage.batch.micro or stage.batch.block,
        recompute=stage.recompute if isinstance(stage.recompute, str) else "selective",
        adapter=stage.adapter
        if stage.adapter is None or not stage.adapter.continue_
        else Adapter(base=stage.adapter.base),
        shape=shape_of(stage.parallel, pool.most),
        states_per_parameter=stage.optimizer.state_per_parameter,  # type: ignore[attr-defined]
        computed=Precision.choose(stage.precision, device, stored, stage.half).dtype,
        stored=stored,
        frozen_models=len(beside),
        saves_beside_training=every is not None and (stage.steps is None or every < stage.steps),
        head_chunk_bytes=Limits.of(device).chunk_bytes,
        device_is_host=device.type == "cpu",
    )


def _pool(assembly: Assembly) -> Pool:
    return assembly.manifest.compute.pools.get(assembly.config.pool, Pool())


def _limit(assembly: Assembly) -> int | None:
    pool = _pool(assembly)
    return pool.device_memory or (None if pool.gpus_per_worker else pool.memory_per_worker)


def _base_bytes(assembly: Assembly) -> int:
    """What a process takes that has imported everything, as this one has; beside a GPU it is another memory."""
    return 0 if _pool(assembly).gpus_per_worker else hardware.resident_bytes()
