"""Runs as they stand on the disk, written without training anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from postlude.manifest.load import load
from postlude.manifest.lock import dump_lock, lock
from postlude.runs import Run

MANIFEST = """
name: small
data:
  chats: {{source: {{path: chats.jsonl}}, format: messages}}
stages:
  sft: {{recipe: sft, model: {{path: nowhere}}, data: {{chats: 1.0}}, steps: 400, optimizer: {{lr: {lr}}}}}
  more: {{recipe: sft, model: {{from: sft}}, data: {{chats: 1.0}}, steps: 4}}
"""


def new_run(folder: Path, name: str = "small", lr: float = 1e-4) -> Run:
    """A run of two stages, of which none has begun."""
    run = Run(str(folder / name))
    run.write_manifest_lock(dump_lock(lock(load(MANIFEST.format(lr=lr).encode(), "small.yaml"))))
    return run


def make_steps(run: Run, steps: Iterable[int], stage: str = "sft", **others: float) -> None:
    """Add lines of metrics; the loss of a step is 5 / step."""
    journal = run.stage(stage).metrics
    for step in steps:
        line = {"step": step, "progress": step / 400, "loss": 5 / step, "lr": 1e-4, "grad_norm": 1.0, "tokens": 100}
        journal.append({**line, "tokens_per_second": 50.0, "seconds": 2.0, **others})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose first stage has made ten steps."""
    run = new_run(tmp_path)
    run.stage("sft").enter("running")
    make_steps(run, range(1, 11))
    return run
