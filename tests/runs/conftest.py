"""Runs to work on, behind a local path and a remote URI."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from postlude.runs import Run
from postlude.storage import rules
from storage.conftest import encrypt, new_master_key


@pytest.fixture(params=["local", "memory", pytest.param("encrypted", marks=pytest.mark.long)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URI of a folder for runs."""
    if request.param == "encrypted":
        encrypt(str(tmp_path), new_master_key(tmp_path.parent))
    yield f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path)
    rules.use(())


@pytest.fixture
def run(place: str) -> Run:
    """A run that has begun."""
    run = Run(f"{place}/assistant")
    run.write_manifest_lock("name: assistant\n")
    return run


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Starts a process that calls a function, and kills it when the test ends at the latest."""
    started: list[BaseProcess] = []

    def start_process(function: Callable[..., object], *arguments: object) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.join()
