"""Which engine a rank of a stage asks, and how it comes by the model's weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from postlude.manifest.compute import Pool
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelPlace
from postlude.model.language_model import LanguageModel
from postlude.recipes.answering import Answering, Sampled
from postlude.recipes.online import OnlineRecipe
from postlude.rollout.engine import Engine
from postlude.rollout.native import PolicyEngine
from postlude.rollout.prompts import PromptEncoder
from postlude.rollout.serving.external import ExternalEngine, Slot
from postlude.rollout.serving.server import EngineChoice, Server, Serving
from postlude.rollout.serving.weight_transfer import WeightTransfer, write_for_engines
from postlude.stages.models import Models
from postlude.stages.parts import Parts
from postlude.stages.training_models import TrainingModels
from postlude.training.precision import DTYPES
from postlude.training.workers import Workers

VERSIONS = 3
"""Of the weights that may be there at a time: one that is read, one that waits, one that is written."""


def policy_engine(models: TrainingModels) -> Engine:
    """What answers with a policy that is trained: itself; or the engine beside this rank; or its part of those that are
    in a pool of their own."""
    parts, config = models.parts, models.parts.config_of(OnlineRecipe)
    policy, rollout = models.program.roles["policy"].model, config.rollout
    if not rollout.engine.is_external:
        return PolicyEngine(policy, models.precision, rollout.concurrency)
    pool = parts.manifest.compute.pools.get(rollout.pool or config.pool, Pool())
    dtype = DTYPES[models.precision.name]
    serving = _serving(
        policy,
        rollout,
        dtype,
        context=config.batch.block,
        concurrency=rollout.concurrency,
        adapter_rank=_rank_alone(policy, rollout.engine),
        threads=(pool.cpus_per_worker if rollout.pool else None) or parts.task.threads,
        gpus=pool.gpus_per_worker,
    )

    def write(folder: Path, before: Path | None) -> None:
        write_for_engines(policy, folder, dtype, parts.workers, serving.adapter_rank > 0, before)

    return _external(rollout.engine, serving, write, _servers(parts, rollout.engine, serving))


def fixed_engine(models: Models, start: ModelPlace, config: Sampled) -> tuple[Engine, Any]:
    """What answers with a model that is not trained, in this process or in one of its own, which is given the weights
    with its first and only update; and the model's generation config."""
    if not config.engine.is_external:
        native = models.engine(start, config.concurrency)
        return native, native.causal.generation_config
    parts = models.parts
    model, _ = models.language_model(start)
    pool = parts.manifest.compute.pools.get(parts.config.pool or "", Pool())
    context = config.context or getattr(model.causal.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        raise ManifestError(
            f"stages.{parts.task.stage}: nothing says how many tokens the model takes. Give 'context' beside 'engine'."
        )
    dtype = next(model.causal.parameters()).dtype
    serving = _serving(
        model,
        config,
        dtype,
        context=context,
        concurrency=config.concurrency,
        threads=parts.task.threads,
        gpus=pool.gpus_per_worker,
    )
    generation_config = model.causal.generation_config
    held = [model]  # let go once it is written
    del model

    def write(folder: Path, before: Path | None) -> None:
        write_for_engines(held.pop(), folder, dtype, Workers())

    config.engine.check()
    return _external(config.engine, serving, write, [partial(config.engine.server, serving)]), generation_config


def stop_ids_of(generation_config: Any, encoder: PromptEncoder) -> frozenset[int]:
    """The tokens with which a model ends an answer: what its template and its generation config say."""
    configured = generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    return frozenset([*encoder.stop_ids(), *(token for token in own if token is not None)])


def _serving(model: LanguageModel, config: Answering, dtype: torch.dtype, **keys: Any) -> Serving:
    return Serving(
        weights=sum(parameter.numel() for parameter in model.causal.parameters()) * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        seconds=float(config.engine_seconds),
        **keys,
    )


def _external(
    choice: EngineChoice,
    serving: Serving,
    write: Callable[[Path, Path | None], None],
    servers: list[Callable[[], Server]],
) -> ExternalEngine:
    transfer = WeightTransfer(write, lambda: choice.weights_folder(VERSIONS * serving.weights))
    slots = [Slot(choice.component_name, make, transfer, number) for number, make in enumerate(servers)]
    return ExternalEngine(slots, transfer, serving.context, choice.updates_in_flight)


def _rank_alone(policy: LanguageModel, choice: EngineChoice) -> int:
    """The rank of the policy's adapter, where it has one that the engine takes by itself; else 0."""
    if policy.attached is None:
        return 0
    config = policy.attached.config
    if config.rank_pattern or config.alpha_pattern:
        return 0  # vLLM scales all layers alike
    return config.r if choice.takes_adapter(config.r, config.use_dora) else 0


def _servers(parts: Parts, choice: EngineChoice, serving: Serving) -> list[Callable[[], Server]]:
    """What makes each engine that this rank asks. Of ranks with the same data one asks for all."""
    workers, hosts = parts.workers, parts.task.engines
    if not workers.speaks:
        return []
    if not hosts:
        choice.check()
        return [partial(choice.server, serving)]
    from postlude.cluster.engines import HostedServer  # loads Ray

    own = range(workers.data_rank, len(hosts), workers.data_world)
    return [partial(HostedServer, hosts, number, choice, serving) for number in own]
