"""A guardian runs a command, and sees to it that nothing of it stays once this process has ended, in whatever way.

:class:`Process` is what the command is started with. The rest runs in the guardian's own process, as a script that
imports nothing heavy:

    python guardian.py FOLDER FD COMMAND...

When its standard input ends, because whoever started it is gone or wants it gone, the command is asked to end, and the
folder is removed. When the command ends by itself, the folder stays for whoever asks why. What the command has
started has a little time to clear away what it shares, and is then killed. The file descriptor ``FD`` goes to the
command; -1 for none.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 5.0
LOG = "engine.log"
LOG_LINES = 12
"""Of the log of an engine that died, which are told."""


class Process:
    """A command under a guardian: it ends with this process. ``folder`` holds its log, and its temporary files."""

    def __init__(
        self, folder: Path, command: Sequence[str], environment: Mapping[str, str], descriptor: int = -1
    ) -> None:
        self._folder = folder
        with open(folder / LOG, "wb") as log:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(folder), str(descriptor), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "TMPDIR": str(folder)},
                pass_fds=[] if descriptor < 0 else [descriptor],
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._guardian.poll() is None

    def last_words(self) -> str:
        """The end of what it printed."""
        try:
            lines = (self._folder / LOG).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LOG_LINES:])

    def kill(self) -> None:
        """Kill it with all that it has started; the folder stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guardian.pid, signal.SIGKILL)
        self._guardian.wait()

    def close(self) -> None:
        """Have it end, and wait until it and its folder are gone."""
        if self._guardian.stdin is not None:
            with contextlib.suppress(OSError):
                self._guardian.stdin.close()
        self._guardian.wait()
        shutil.rmtree(self._folder, ignore_errors=True)  # where it had ended by itself


class Room:
    """A folder that is gone once it is closed, or this process has ended, in whatever way."""

    def __init__(self, parent: Path) -> None:
        from postlude.storage import Scratch  # not for the script

        self._scratch = Scratch(f"engine-{os.getpid()}", str(parent))  # the next one removes it where all were killed
        self.path = self._scratch.path
        self._process = Process(self.path, ["sleep", "infinity"], os.environ)

    def close(self) -> None:
        self._process.close()
        self._scratch.close()


# --- in the guardian's process ------------------------------------------------------------------------------


def main() -> None:
    folder, descriptor, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # unlike one that is ignored, it is not handed on to the command
    descriptors = [] if descriptor < 0 else [descriptor]
    _step_behind(descriptors)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
    for passed_on in descriptors:
        os.close(passed_on)  # so that the other end is told when the command is gone
    is_ending = threading.Event()

    def end_with_the_command() -> None:
        process.wait()
        if not is_ending.is_set():
            _end()

    threading.Thread(target=end_with_the_command, daemon=True).start()
    sys.stdin.buffer.read()
    is_ending.set()
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    _end()


def _step_behind(descriptors: list[int]) -> None:
    """Go on as a grandchild of whoever started this, since Ray kills the children of a worker that it ends; the child
    only waits, so that it is there for as long as this is."""
    grandchild = os.fork()
    if grandchild:
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(grandchild, 0)
        os._exit(0)


def _end() -> None:
    """Let the processes of this group leave, which clear away what they share; kill what stays, and this one."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _others_live() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def _others_live() -> bool:
    """Whether another process shares the group of this one and of that which waits for it."""
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                number, rest = file.read().split(" ", 1)
        except OSError:  # it is gone
            continue
        state, _, group = rest.rpartition(")")[2].split()[:3]
        if int(group) == os.getpgrp() and int(number) not in (os.getpid(), os.getppid()) and state != "Z":
            return True
    return False


if __name__ == "__main__":
    main()
