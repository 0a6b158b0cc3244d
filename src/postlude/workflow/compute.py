"""What the manifest asks of the machine, held against what the machine has."""

from __future__ import annotations

import os

from postlude.manifest.errors import ComputeError
from postlude.manifest.graph import ancestors, descendants
from postlude.manifest.schema import Manifest, StageConfig, TrainingStage

DEFAULT_POOL = "train"


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def pool_of(stage: StageConfig) -> str:
    """The pool that a stage takes up while it runs. One that has none takes the place of one that trains."""
    return next(iter(stage.all_pools), DEFAULT_POOL)


def ranks_of(manifest: Manifest, stage: StageConfig) -> int:
    """How many workers run the stage: those of its first pool, or one."""
    return next((manifest.compute.pools[name].workers for name in stage.all_pools if name in manifest.compute.pools), 1)


def ranks_beside(manifest: Manifest, name: str) -> int:
    """How many workers of other stages may be at work while a stage runs.

    On each other pool those of the largest stage that neither hangs on this one nor is needed by it. It follows from
    the manifest alone, so that a stage computes with the same threads whenever it runs, and comes out the same.
    """
    own = pool_of(manifest.stages[name])
    kin = {name} | ancestors(manifest, name) | descendants(manifest, name)
    largest: dict[str, int] = {}
    for other, stage in manifest.stages.items():
        pool = pool_of(stage)
        if other not in kin and pool != own:
            largest[pool] = max(largest.get(pool, 0), ranks_of(manifest, stage))
    return sum(largest.values())


def threads_of(stage: StageConfig, ranks: int, beside: int = 0) -> int:
    """CPU threads of each worker: what the stage says, or its share of the cores.

    ``beside`` counts the workers of other stages that may run at the same time.
    """
    asked = stage.threads if isinstance(stage, TrainingStage) else None
    return asked or max(1, cores() // (ranks + beside))


def devices_of(manifest: Manifest, stage: StageConfig) -> dict[str, str]:
    """The environment that shows a stage the GPUs of its own pool alone; empty where it uses none."""
    own, first = pool_of(stage), 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    for name, pool in manifest.compute.pools.items():
        count = pool.workers * pool.gpus_per_worker
        if name == own:
            numbers = [str(number) for number in range(first, first + count)]
            if shown:
                numbers = shown.split(",")[first : first + count]
            return {"CUDA_VISIBLE_DEVICES": ",".join(numbers)} if count else {}
        first += count
    return {}


def check_compute(manifest: Manifest) -> None:
    """:class:`ComputeError` if this machine cannot hold the pools of the manifest."""
    wanted = sum(pool.workers * pool.gpus_per_worker for pool in manifest.compute.pools.values())
    if not wanted:
        return
    import torch

    found = torch.cuda.device_count()
    if wanted > found:
        pools = ", ".join(
            f"{name}: {pool.workers} workers of {pool.gpus_per_worker}" for name, pool in manifest.compute.pools.items()
        )
        raise ComputeError(
            f"compute.pools asks for {wanted} GPUs ({pools}), but this machine has {found}. "
            "Lower workers or gpus_per_worker; 0 trains on the CPU."
        )
