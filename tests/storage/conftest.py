"""Places to write to: ordinary ones, local and remote, and a disk that is small or read-only for real."""

from __future__ import annotations

import multiprocessing
import subprocess
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from postlude.manifest.storage import plain
from postlude.storage import keys, rules

_ENCRYPTED_MEMORY = pytest.param("encrypted memory", marks=pytest.mark.long)


@pytest.fixture(params=["local", "memory", "s3", "encrypted local", _ENCRYPTED_MEMORY])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URI of a folder that is not there yet, and in which nobody should have to know whether it is encrypted."""
    yield from _place(request, tmp_path)


@pytest.fixture(params=["local", "memory", pytest.param("encrypted local", marks=pytest.mark.long)])
def near_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same, for what asks for hundreds of requests."""
    yield from _place(request, tmp_path)


def _place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield f"s3://{request.getfixturevalue('bucket')}/place"
        return
    above = str(tmp_path) if "local" in request.param else f"memory://{uuid.uuid4().hex}"
    if "encrypted" in request.param:
        above = f"{above}/encrypted"
        encrypt(above, new_master_key(tmp_path))
    yield f"{above}/place"
    rules.use(())


def new_master_key(folder: Path) -> str:
    """A new key file, as a manifest names it."""
    path = folder / f"{uuid.uuid4().hex}.key"
    keys.new_key_file(str(path))
    return f"file:{path}"


def encrypt(uri: str, key: str) -> None:
    """Have all below a place be encrypted in this process, and nothing else."""
    rules.use([rules.Rule(prefix=plain(uri), encrypt=rules.Encryption(key=key))])


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
