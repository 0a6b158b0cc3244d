"""What a stage that trains will need of each worker's memory, and whether the model divides among the workers."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from postlude.errors import ComputeError
from postlude.manifest.adapter import Adapter
from postlude.manifest.compute import Pool, shape_of
from postlude.model import memory, sharded, tensor_parallel, vocabulary
from postlude.model.memory import MIB, MemoryPlan
from postlude.objectives.logits import Limits
from postlude.stages.training_models import TrainingModels
from postlude.telemetry import hardware
from postlude.training.optimizers import Optimizer
from postlude.training.precision import Precision


def plan_of(models: TrainingModels, config: PreTrainedConfig) -> MemoryPlan:
    """What one worker of the stage will need."""
    return memory.plan(config, _setting(models, config), _base_bytes(models))


def check_memory(models: TrainingModels) -> None:
    """:class:`ComputeError` if the manifest says what memory a worker has, and by the plan it is not enough."""
    if _limit(models) is not None:
        config = models.configuration(models.config.model)
        check_fits(models, config, plan_of(models, config))


def check_fits(models: TrainingModels, config: PreTrainedConfig, plan: MemoryPlan) -> None:
    """:class:`ComputeError` where the plan needs more than a worker has, with what would fit."""
    limit = _limit(models)
    if limit is None or plan.peak_bytes <= limit:
        return
    setting, base = _setting(models, config), _base_bytes(models)
    fits = memory.what_fits(config, setting, _pool(models).most, limit, base)
    advice = (
        "No single setting would make it fit: take more workers with 'parallel: {shard: true}', or a smaller model."
    )
    if fits:
        advice = f"Any of these would fit: {'; '.join(fits)}."
    raise ComputeError(
        f"stages.{models.parts.task.stage}: by the memory plan a worker needs {plan.peak_bytes / MIB:,.0f} MiB at its "
        f"peak, and the pool '{models.config.pool}' gives each {limit / MIB:,.0f} MiB. {advice}"
    )


def check_mesh(models: TrainingModels, config: PreTrainedConfig) -> None:
    """ManifestError if the model cannot be divided among the workers in the way that the stage asks for."""
    shape = shape_of(models.config.parallel, _pool(models).most)
    if shape is None or shape.tensor == 1:
        return
    causal = sharded.on_meta(config)
    vocabulary.pad(causal)
    tensor_parallel.check_divides(causal, shape.tensor)


def _setting(models: TrainingModels, config: PreTrainedConfig) -> memory.Setting:
    stage, pool = models.config, _pool(models)
    device = torch.device("cuda" if pool.gpus_per_worker else "cpu")
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    shares_base = [stage.adapter and companion.start == stage.model for companion in stage.companions().values()]
    every = stage.checkpoint.every
    return memory.Setting(
        tokens=stage.batch.micro or stage.batch.block,
        recompute=stage.recompute if isinstance(stage.recompute, str) else "selective",
        adapter=stage.adapter
        if stage.adapter is None or not stage.adapter.continue_
        else Adapter(base=stage.adapter.base),
        shape=shape_of(stage.parallel, pool.most),
        states_per_parameter=Optimizer.of(stage.optimizer).state_per_parameter,
        computed=Precision.choose(stage.precision, device, stored, stage.half).dtype,
        stored=stored,
        frozen_models=sum(not shared for shared in shares_base),
        saves_beside_training=every is not None and (stage.steps is None or every < stage.steps),
        head_chunk_bytes=Limits.of(device).chunk_bytes,
        device_is_host=device.type == "cpu",
    )


def _pool(models: TrainingModels) -> Pool:
    return models.parts.manifest.compute.pools.get(models.config.pool, Pool())


def _limit(models: TrainingModels) -> int | None:
    pool = _pool(models)
    return pool.device_memory or (None if pool.gpus_per_worker else pool.memory_per_worker)


def _base_bytes(models: TrainingModels) -> int:
    """What a process takes that has imported everything, as this one has; beside a GPU it is another memory."""
    return 0 if _pool(models).gpus_per_worker else hardware.resident_bytes()
