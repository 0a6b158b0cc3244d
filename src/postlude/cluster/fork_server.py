"""Workers are forked from one process that has imported what all of them need: a worker then starts in a moment, where
importing takes seconds of a core.

For workers on this machine that have no GPU: what a library has asked of one holds in no fork. Elsewhere, and where
this process is gone, workers start by themselves.

Ray is told to start :mod:`postlude.cluster.fork_client` in place of Python. That hands over its arguments, environment
and open files, and the process that is forked runs with them what Python would have run. The two end together, and all
end with this process, which ends with the command.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from postlude import storage
from postlude.cluster import fork_client
from postlude.processes import die_with_parent

_REQUEST_SECONDS = 10.0
_MOST_WAITING = 64
_place: str | None = None
"""The socket of the one that this process, or a parent of it, has started."""


# --- who wants workers --------------------------------------------------------------------------------------


@contextmanager
def fork_server(modules: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Have workers of this process, and of those that it forks, made by one that has imported ``modules`` with these
    variables, for as long as the context lasts. Where there is one already that one serves."""
    global _place
    if _place is not None:
        yield
        return
    with storage.scratch_folder("fork") as folder, socket.socket(socket.AF_UNIX) as listener:
        place = os.path.join(folder, "s")
        listener.bind(place)
        listener.listen(_MOST_WAITING)  # who asks while modules are imported waits
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(listener.fileno()), str(os.getpid()), *modules],
            env={**os.environ, **environment},
            stdin=nowhere,
            stdout=nowhere,
            stderr=nowhere,
            pass_fds=[listener.fileno()],
            process_group=0,  # what a terminal sends comes through the command alone
        )
        listener.close()  # so that nobody listens once that process is gone
        _place = place
        try:
            yield
        finally:
            _place = None
            process.kill()
            process.wait()


def runtime_environment(has_gpus: bool) -> dict[str, Any]:
    """What Ray is told of a worker so that it is forked; nothing where it cannot be."""
    if _place is None or has_gpus:
        return {}
    command = [sys.executable, "-I", "-S", fork_client.__file__, _place]
    return {"runtime_env": {"py_executable": shlex.join(command)}}


# --- the process that makes them ----------------------------------------------------------------------------


class _Server:
    """Forks what it is asked for. It has one thread, as a process that is forked must."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._lines: dict[int, socket.socket] = {}
        """To who stands for each worker, by process number."""
        self._ended, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any]:
        """Returns in each worker, with what it is to be; never in this process."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._ended:
                    os.read(self._ended, 4096)
                    self._bury()
                elif key.fileobj is self._listener:
                    if (wanted := self._answer()) is not None:
                        return wanted
                elif key.data in self._lines:  # else its worker has just ended as well
                    self._kill(key.data)

    def _answer(self) -> dict[str, Any] | None:
        """Fork a worker: None in this process, in the other what it is to be."""
        line, _ = self._listener.accept()
        line.settimeout(_REQUEST_SECONDS)
        files: list[int] = []
        try:
            line.sendall(fork_client.HELLO)
            request, files, _, _ = socket.recv_fds(line, 2**16, 3)
            while not request.endswith(b"\n"):
                request += (piece := line.recv(2**16))
                if not piece:
                    raise ConnectionError("who asked is gone")
            wanted: dict[str, Any] = json.loads(request)
        except (OSError, ValueError):
            line.close()
        else:
            pid = os.fork()
            if not pid:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                self._leave()
                line.close()
                return wanted
            self._lines[pid] = line
            self._selector.register(line, selectors.EVENT_READ, pid)
        finally:
            for file in files:
                os.close(file)
        return None

    def _leave(self) -> None:
        """In a worker: have nothing more to do with this one. Ray may end a worker's whole group of processes."""
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        self._listener.close()
        for line in self._lines.values():
            line.close()

    def _kill(self, pid: int) -> None:
        """Who stands for it is gone."""
        self._selector.unregister(self._lines[pid])
        self._lines.pop(pid).close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _bury(self) -> None:
        """Tell how workers ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                line = self._lines.pop(ended[0], None)
                if line is not None:
                    self._selector.unregister(line)
                    with suppress(OSError):
                        line.sendall(b"%d" % min(abs(os.waitstatus_to_exitcode(ended[1])), 255))
                    line.close()


def main(listener: int, parent: int, modules: Sequence[str]) -> None:
    """Import, and fork whoever is asked for."""
    die_with_parent(parent)
    for module in modules:
        importlib.import_module(module)
    server_id = os.getpid()
    wanted = _Server(socket.socket(fileno=listener)).serve()
    die_with_parent(server_id)
    _run(wanted)


def _run(wanted: Mapping[str, Any]) -> None:
    """What Python does with these arguments; does not return."""
    status: int | str | None = 0
    try:
        os.environ.clear()
        os.environ.update(wanted["environment"])
        os.chdir(wanted["folder"])
        sys.argv = list(wanted["arguments"])
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
