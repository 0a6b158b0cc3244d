"""What the manifest asks of the machine, held against what the machine has."""

from __future__ import annotations

import os

from postlude.manifest.errors import ComputeError
from postlude.manifest.schema import Manifest, StageConfig


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def ranks_of(manifest: Manifest, stage: StageConfig) -> int:
    """How many workers train the stage: those of its first pool, or one."""
    return next((manifest.compute.pools[name].workers for name in stage.pools if name in manifest.compute.pools), 1)


def threads_of(stage: StageConfig, ranks: int) -> int:
    """CPU threads of each worker: what the stage says, or its share of the cores."""
    asked = getattr(stage, "threads", None)
    return asked or max(1, cores() // ranks)


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
