"""Whether a program passes a test, found out within the best walls that this machine gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import postlude
from postlude.rollout.sandbox.supervisor import REFUSED, START_SECONDS
from postlude.rollout.sandbox.walls import ALL_FILES, BUBBLEWRAP, LANDLOCK, NAMESPACES, NOTHING

_SOURCE = Path(postlude.__file__).parents[1]
_FROM_SOURCE = """
import sys
sys.path.append(sys.argv.pop())
from postlude.rollout.sandbox.{} import {}
sys.path.pop()
"""


@dataclass(frozen=True)
class SandboxLimits:
    """What a test may have, with all the processes that it and the program start."""

    seconds: float
    memory_bytes: int
    isolated: bool = True


class NotIsolated(RuntimeError):
    """This machine gives this user no walls: neither bubblewrap nor namespaces nor Landlock; or not even the limits of
    who has none."""


def passes(program: str, test: str, limits: SandboxLimits) -> bool:
    """Whether a program runs, and the test after it, to the end of both without an exception. What ends a process
    before has not passed.

    :class:`NotIsolated` where it shall be, or be limited, and cannot be.
    """
    verdict = _verdict(program, test, limits, walls_of(limits))
    if verdict is None:
        raise NotIsolated
    return verdict


def walls_of(limits: SandboxLimits) -> str:
    """What parts programs from this machine. :class:`NotIsolated` where they shall be and cannot be."""
    return _best_walls() if limits.isolated else NOTHING


@cache
def _best_walls() -> str:
    enough = SandboxLimits(START_SECONDS, 512 * 2**20)
    for kind in (BUBBLEWRAP, NAMESPACES, LANDLOCK):
        if _verdict("", "", enough, kind):
            return kind
    raise NotIsolated


def _verdict(program: str, test: str, limits: SandboxLimits, walls: str) -> bool | None:
    """None where there are no such walls."""
    bubblewrap = shutil.which("bwrap") if walls == BUBBLEWRAP else None
    if walls == BUBBLEWRAP and bubblewrap is None:
        return None
    source = str(_SOURCE)
    with tempfile.TemporaryDirectory(prefix="postlude-sandbox-", ignore_cleanup_errors=True) as folder:
        within = "/tmp" if bubblewrap else folder
        order = {**asdict(limits), "walls": walls, "folder": within}
        order["parent"] = 0 if bubblewrap else os.getpid()
        main = _FROM_SOURCE.format("supervisor", "main") + "sys.exit(main())"
        command = [sys.executable, "-I", "-c", main, json.dumps(order), source]
        try:
            done = subprocess.run(
                [*_bubblewrapped(bubblewrap, source), *command] if bubblewrap else command,
                input=json.dumps({"program": program, "test": test}).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": within, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
                timeout=limits.seconds + 2 * START_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode == REFUSED or (bubblewrap and done.returncode != 0):
        return None
    return done.returncode == 0 and done.stdout == b"1"


@cache
def _readable() -> list[str]:
    """What :func:`postlude.rollout.sandbox.walls.readable` names in the sandbox, where the path is that of the
    interpreter alone."""
    names = f"{_FROM_SOURCE.format('walls', 'readable')}import json; print(json.dumps(readable()))"
    command = [sys.executable, "-I", "-c", names, str(_SOURCE)]
    folders: list[str] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return folders


def _bubblewrapped(bubblewrap: str, source: str) -> list[str]:
    """The command that runs another within a root like that of :func:`postlude.rollout.sandbox.walls.build_root`."""
    command = [bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for folder in [*_readable(), source]:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dir", "/run", "--dir", "/dev"]
    return [
        *command,
        "--size",
        str(ALL_FILES),
        "--tmpfs",
        "/tmp",
        "--proc",
        "/proc",
        "--remount-ro",
        "/proc",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
    ]
