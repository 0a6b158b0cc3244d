"""What the manifest asks of the machines, held against what there is."""

from __future__ import annotations

from postlude.cluster.providers.base import provider_of
from postlude.cluster.transport import check_collectives, check_transport
from postlude.errors import ComputeError
from postlude.manifest.compute import Pool, check_workers
from postlude.manifest.graph import ancestors, descendants
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import Manifest, StageConfig
from postlude.telemetry.hardware import cores

DEFAULT_POOL = "train"


def pools_of(stage: StageConfig) -> tuple[str, ...]:
    """The pools that a stage takes up while it runs, its own first. One that has none takes the place of one that
    trains."""
    return stage.all_pools or (DEFAULT_POOL,)


def pool_name(stage: StageConfig) -> str:
    """The pool whose workers run a stage."""
    return pools_of(stage)[0]


def pool_of(manifest: Manifest, stage: StageConfig) -> Pool:
    """What the manifest says of that pool; a single worker where it says nothing."""
    return manifest.compute.pools.get(pool_name(stage), Pool())


def engines_of(manifest: Manifest, stage: StageConfig) -> Pool | None:
    """What the manifest says of the pool of a stage's engines; None where they have none of their own."""
    others = pools_of(stage)[1:]
    return manifest.compute.pools.get(others[0], Pool()) if others else None


def ranks_of(manifest: Manifest, stage: StageConfig) -> int:
    """How many workers run the stage, where there is room."""
    return pool_of(manifest, stage).most


def ranks_beside(manifest: Manifest, name: str) -> int:
    """How many workers of other stages may be at work while a stage runs.

    On each other pool those of the largest stage that neither hangs on this one nor is needed by it. It follows from
    the manifest alone, so that a stage computes with the same threads whenever it runs, and comes out the same.
    """
    own = pool_name(manifest.stages[name])
    kin = {name} | ancestors(manifest, name) | descendants(manifest, name)
    largest: dict[str, int] = {}
    for other, stage in manifest.stages.items():
        pool = pool_name(stage)
        if other not in kin and pool != own:
            largest[pool] = max(largest.get(pool, 0), ranks_of(manifest, stage))
    return sum(largest.values())


def threads_of(manifest: Manifest, name: str, inline: bool = False) -> int:
    """CPU threads of each worker of a stage: what the stage says, or what its pool reserves; on this machine its share
    of the cores."""
    stage = manifest.stages[name]
    threads = getattr(stage, "threads", None) or pool_of(manifest, stage).cpus_per_worker
    if threads:
        return threads
    if inline:
        return cores()
    if manifest.compute.provider.is_remote:
        return 1
    return max(1, cores() // (ranks_of(manifest, stage) + ranks_beside(manifest, name)))


def check_compute(manifest: Manifest) -> None:
    """:class:`ComputeError` if this machine cannot hold the pools of the manifest, or lacks a variable that it names.
    Of another's machines nothing is known before it is asked."""
    compute = manifest.compute
    compute.variables()
    refuses_clear_text = compute.transport.require_encryption and not compute.transport.network_is_encrypted
    check_transport(compute)
    check_collectives(compute, map(pool_name, manifest.stages.values()))
    for name, stage in manifest.stages.items():
        rollout = getattr(stage, "rollout", None)
        if refuses_clear_text and rollout is not None and rollout.engine.is_asked_in_clear_text:
            raise ComputeError(
                f"compute.transport requires encryption, and the stage '{name}' asks servers at addresses, over HTTP "
                "in clear text. Give its engines a pool with rollout.pool, which Ray's TLS protects, or say "
                "network_is_encrypted: true if what lies below encrypts."
            )
        engines = engines_of(manifest, stage)
        if engines is not None and engines.least != engines.most:
            raise ComputeError(
                f"stages.{name}: the pool '{pools_of(stage)[1]}' of its engines has between {engines.least} and "
                f"{engines.most} workers, and what they answer depends on their number. Give it a fixed one."
            )
        parallel = getattr(stage, "parallel", None)
        if parallel is not None:
            try:
                check_workers(parallel, pool_of(manifest, stage).workers)
            except ManifestError as error:
                raise ComputeError(f"stages.{name}: {error}") from error
    provider_of(compute).check_pools(compute)
