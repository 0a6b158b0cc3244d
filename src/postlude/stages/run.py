"""A stage on one rank, from where it stopped to its artifact.

What follows is the story of every stage; what a kind of stage does in it is told by its class:
:mod:`postlude.stages.training` for those that train, :mod:`postlude.stages.work` for the others.
"""

from __future__ import annotations

import torch

from postlude.stages.parts import StageTask, devices_of
from postlude.stages.stage import open_stage
from postlude.telemetry.progress import Display, StageProgress
from postlude.telemetry.recorder import Recorder
from postlude.telemetry.sinks.sink import Sink
from postlude.training.interruption import Interruption
from postlude.training.summary import Summary
from postlude.training.workers import Workers


def run_stage_here(task: StageTask) -> Summary:
    """Work on a stage in this process, which has a terminal and listens to signals: alone, or as the rank that the
    environment names (torchrun's variables)."""
    torch.set_num_threads(task.threads)
    with Interruption().listening() as stop, StageProgress(task.stage) as display:
        return run_stage(task, stop, display)


def run_stage(task: StageTask, stop: Interruption, display: Display) -> Summary:
    """Work on a stage as one of its ranks, until its artifact is written or until asked to stop."""
    workers = Workers.join(*devices_of(task))
    try:
        stage = open_stage(task, workers)
        parts = stage.parts
        shown = display if workers.leads else None  # the others would show the same
        sinks = [Sink.of(sink) for sink in parts.manifest.sinks]
        with Recorder(parts.run, task.stage, sinks, workers.rank, shown) as recorder:
            return stage.run(recorder, stop)
    finally:
        workers.leave()
