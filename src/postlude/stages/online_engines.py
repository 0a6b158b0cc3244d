"""Which engines a rank of a stage of online reinforcement learning asks, and how they come by the policy's weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from postlude.manifest.compute import Pool
from postlude.rollout.colocated import PolicyEngine
from postlude.rollout.serving.external import ExternalEngine, Slot
from postlude.rollout.serving.server import EngineChoice, Server, Serving
from postlude.rollout.serving.weight_transfer import WeightTransfer, write_for_engines
from postlude.training.precision import DTYPES

if TYPE_CHECKING:
    from postlude.model.language_model import LanguageModel
    from postlude.stages.online import OnlineAssembly

VERSIONS = 3
"""Of the weights that may be there at a time: one that is read, one that waits, one that is written."""


def engine_of(parts: OnlineAssembly) -> PolicyEngine | ExternalEngine:
    """The policy itself; or the engine beside this rank; or its part of those that are in a pool of their own."""
    policy, rollout = parts.program.roles["policy"].model, parts.config.rollout
    choice = rollout.engine
    if not choice.is_external:
        return PolicyEngine(policy, parts.precision, rollout.concurrency)
    pools = parts.manifest.compute.pools
    pool = pools.get(rollout.pool or parts.config.pool, Pool())
    dtype = DTYPES[parts.precision.name]
    serving = Serving(
        context=parts.config.batch.block,
        concurrency=rollout.concurrency,
        weights=sum(parameter.numel() for parameter in policy.causal.parameters()) * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        seconds=float(rollout.engine_seconds),
        adapter_rank=_rank_alone(policy, choice),
        threads=(pool.cpus_per_worker if rollout.pool else None) or parts.task.threads,
        gpus=pool.gpus_per_worker,
    )

    def write(folder: Path, before: Path | None) -> None:
        write_for_engines(policy, folder, dtype, parts.workers, serving.adapter_rank > 0, before)

    transfer = WeightTransfer(write, lambda: choice.weights_folder(VERSIONS * serving.weights))
    slots = [Slot(choice.component_name, make, transfer) for make in _servers(parts, serving)]
    return ExternalEngine(slots, transfer, serving.context, choice.updates_in_flight)


def _rank_alone(policy: LanguageModel, choice: EngineChoice) -> int:
    """The rank of the policy's adapter, where it has one that the engine takes by itself; else 0."""
    if policy.attached is None:
        return 0
    config = policy.attached.config
    return config.r if choice.takes_adapter(config.r, config.use_dora) else 0


def _servers(parts: OnlineAssembly, serving: Serving) -> list[Callable[[], Server]]:
    """What makes each engine that this rank asks. Of ranks with the same data one asks for all."""
    workers, choice, hosts = parts.workers, parts.config.rollout.engine, parts.task.engines
    if not workers.speaks:
        return []
    if not hosts:
        choice.check()
        return [partial(choice.server, serving)]
    from postlude.cluster.engines import HostedServer  # loads Ray

    own = range(workers.data_rank, len(hosts), workers.data_world)
    return [partial(HostedServer, hosts, number, choice, serving) for number in own]
