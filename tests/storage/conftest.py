"""Places to write to: ordinary ones, local and remote, and a disk that is small or read-only for real."""

from __future__ import annotations

import multiprocessing
import subprocess
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a folder that is not there yet."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket')}/place"
    return str(tmp_path / "place") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory"])
def near_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same, for what asks for hundreds of requests."""
    return str(tmp_path / "place") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The mount point of a file system of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def read_only_disk(small_disk: Path) -> Path:
    """The same with a file in it, and read-only: not even root may write there."""
    (small_disk / "kept").write_text("kept")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


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
