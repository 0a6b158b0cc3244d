"""Runs a command, and sees to it that nothing of it stays: a script of its own, which imports nothing heavy.

    python guardian.py FOLDER FD COMMAND...

When the standard input ends, because whoever started this is gone or wants it gone, the command is asked to end, and
the folder is removed. When the command ends by itself, the folder stays for whoever asks why. What the command has
started has a little time to clear away what it shares, and is then killed. The file descriptor ``FD`` goes to the
command; -1 for none.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 5.0


def main() -> None:
    folder, descriptor, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asked, lambda *_: None)  # unlike one that is ignored, it is not handed on to the command
    passed = [] if descriptor < 0 else [descriptor]
    _step_behind(passed)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed)
    for one in passed:
        os.close(one)  # so that the other end is told when the command is gone
    ends = threading.Event()
    threading.Thread(target=_wait, args=(process, ends), daemon=True).start()
    sys.stdin.buffer.read()
    ends.set()
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    _end()


def _step_behind(passed: list[int]) -> None:
    """Go on as a grandchild of whoever started this, since Ray kills the children of a worker that it ends; the child
    only waits, so that it is there for as long as this is."""
    grandchild = os.fork()
    if grandchild:
        for one in passed:
            os.close(one)
        os.waitpid(grandchild, 0)
        os._exit(0)


def _wait(process: subprocess.Popen[bytes], ends: threading.Event) -> None:
    """End when the command has ended by itself."""
    process.wait()
    if not ends.is_set():
        _end()


def _end() -> None:
    """Let the processes of this group leave, which clear away what they share; kill what stays, and this one."""
    deadline = time.monotonic() + GRACE_SECONDS
    while _others() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def _others() -> bool:
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
