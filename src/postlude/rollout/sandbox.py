"""Somebody's Python code in a process of its own, with limits. Run as a program by :func:`passes`, and without imports
of the project.

It has limits on time, memory and the size of files. Isolated, by the namespaces of Linux, it reaches no network and no
other process, and writes nowhere but in its folder, which goes with it; what this user may read it can read. It is for
the code of models, not for that of attackers.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LARGEST_FILE = 16 * 2**20
START_SECONDS = 30.0
"""How long an interpreter may take to start."""
REFUSED = 77
"""The exit status where the kernel does not let a process be isolated."""


@dataclass(frozen=True)
class SandboxLimits:
    """What the code may have."""

    seconds: float
    memory_bytes: int
    isolated: bool = True


class NotIsolated(RuntimeError):
    """The kernel gives this user no namespaces, or is older than Linux 5.12."""


def passes(program: str, test: str, limits: SandboxLimits) -> bool:
    """Whether a program runs, and the test after it, to the end of both without an exception. What ends the process
    before has not passed.

    :class:`NotIsolated` where it shall be and cannot be.
    """
    sign = secrets.token_hex(16)
    order = {"program": program, "test": test, "sign": sign, **asdict(limits)}
    with tempfile.TemporaryDirectory(prefix="postlude-sandbox-", ignore_cleanup_errors=True) as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", os.path.abspath(__file__)],
                input=json.dumps(order).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                timeout=limits.seconds + START_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode == REFUSED:
        raise NotIsolated
    return done.returncode == 0 and done.stdout == sign.encode()


# --- in the process -----------------------------------------------------------------------------------------


def _main() -> int:
    order = json.loads(sys.stdin.buffer.read())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if order["isolated"]:
        try:
            _isolate(libc)
        except OSError:
            return REFUSED
    child = os.fork()  # the first process of its own namespace: with it all that it has started ends
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(order["seconds"], order["memory_bytes"])
        sign, out = order["sign"], os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        code = 1
        try:
            scope = {"__name__": "__main__"}
            exec(compile(order["program"], "<completion>", "exec"), scope)
            exec(compile(order["test"], "<test>", "exec"), scope)
            os.write(out, sign.encode())
            code = 0
        finally:
            os._exit(code)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, order["seconds"])
    _, status = os.waitpid(child, 0)
    return 0 if os.waitstatus_to_exitcode(status) == 0 else 1


def _isolate(libc: ctypes.CDLL) -> None:
    """Leave the network and the other processes, and make all but this folder read-only. OSError if that is not
    allowed."""

    def checked(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses it")

    def set_attributes(path: bytes, flags: int, on: int, off: int) -> None:
        attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
        here = ctypes.c_int(-100)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        checked(libc.syscall(MOUNT_SETATTR, here, path, ctypes.c_uint(flags), attributes, size))

    folder = os.getcwdb()
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID
    checked(libc.unshare(flags if os.geteuid() == 0 else flags | CLONE_NEWUSER))
    checked(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    checked(libc.mount(folder, folder, None, ctypes.c_ulong(MS_BIND), None))
    set_attributes(b"/", AT_RECURSIVE, MOUNT_ATTR_RDONLY, 0)
    set_attributes(folder, 0, 0, MOUNT_ATTR_RDONLY)
    os.chdir(folder)
    # Without capabilities nothing of this can be undone, by root neither.
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    checked(libc.capset(version, (ctypes.c_uint32 * 6)()))


def _limit(seconds: float, memory: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    sys.exit(_main())
