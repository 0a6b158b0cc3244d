"""How the threads of OpenMP, which torch computes with, wait for each other. Imports little: it comes first of all.

A thread that waits at a barrier spins, which is quickest where it has a core of its own, or sleeps, which is quickest
where others want the cores: there a spinning thread burns the time of the one it waits for. libgomp, that of torch on
Linux, decides at each wait: while the process has more of its threads than cores they sleep almost at once (``do_spin``
in its source; 100 turns of a loop in place of 300,000). So while others are at work it is given some more, which idle.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long threads spin in programs that are not ours: turns of a loop (libgomp), milliseconds (Intel's and LLVM's)."""

_LOOK_SECONDS = 0.5
_CROWDED, _QUIET = 0.15, 0.08
"""The share of time in which a thread could have run but had no core: above the first others are at work, below the
second they are not. Between and below them is what threads of this process take from each other."""
LOOKS = 5
"""How many looks are judged together: a single one may meet the second in which this process wrote a checkpoint."""


def wait_shortly() -> None:
    """Have the threads of Intel's and LLVM's OpenMP, in this process and all that it starts, sleep soon, unless the
    user has said how they wait. Before torch is imported: they read it once, as they are loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("KMP_BLOCKTIME", SHORT_WAIT["KMP_BLOCKTIME"])


def briefly(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a program that is not ours waits shortly, unless it says how."""
    return dict(environment) if "OMP_WAIT_POLICY" in environment else {**SHORT_WAIT, **environment}


def compute_with(threads: int) -> None:
    """Have torch compute with so many threads in this process, which give way to others (:func:`give_way`)."""
    import torch

    torch.set_num_threads(threads)
    if threads > 1:
        give_way()


def give_way() -> None:
    """From now on the threads that torch computes with sleep at barriers for as long as others want the cores.

    After torch is imported. Nothing happens where the user has said how threads wait, or where there is no libgomp.
    How they wait changes no result.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) and not _watches:
        import torch

        _watches.extend(Watch(library, torch.get_num_threads()) for library in loaded_libraries())
        for watch in _watches:
            threading.Thread(target=watch.keep, name="give way", daemon=True).start()


class Watch:
    """Keeps a libgomp between spinning and sleeping, which has so many ``threads`` where it computes."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library, self._threads = library, threads
        self._leave: threading.Event | None = None
        self._shares: deque[float] = deque(maxlen=LOOKS)

    @property
    def gives_way(self) -> bool:
        """Whether threads sleep at barriers."""
        return self._leave is not None

    def keep(self) -> None:
        """Look at the cores for as long as the process lives."""
        before, since = waited(), time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            after, now = waited(), time.monotonic()
            longest = max(
                (nanoseconds - before.get(thread, nanoseconds) for thread, nanoseconds in after.items()), default=0
            )
            self.judge(longest / 1e9 / (now - since))
            before, since = after, now

    def judge(self, share: float) -> None:
        """Begin to give way, end it, or leave it so. ``share`` is that of the time since the last look in which the
        thread that waited most for a core waited for one."""
        self._shares.append(share)
        if len(self._shares) < LOOKS:
            return
        usual = statistics.median(self._shares)
        if usual > _CROWDED and self._leave is None:
            self._leave = threading.Event()
            threading.Thread(target=self._crowd, args=(self._leave,), name="idle team", daemon=True).start()
        elif usual < _QUIET and self._leave is not None:
            self._leave.set()  # the thread ends, and its team with it
            self._leave = None

    def _crowd(self, leave: threading.Event) -> None:
        """Hold a team of as many threads, beside this one, as make one more than there are cores. They do nothing, and
        sleep."""
        nothing = ctypes.cast(self._library.omp_get_level, ctypes.c_void_p)
        missing = max(self._library.omp_get_num_procs() - self._threads, 0) + 1
        self._library.GOMP_parallel(nothing, None, 1 + missing, 0)
        leave.wait()


_watches: list[Watch] = []


def loaded_libraries() -> list[ctypes.CDLL]:
    """Every libgomp that this process has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # no Linux
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line}
    return [ctypes.CDLL(path) for path in sorted(paths)]


def waited() -> dict[int, int]:
    """How long each thread of this process could have run but had no core, in nanoseconds since it began."""
    times = {}
    with suppress(FileNotFoundError):  # a kernel without these statistics
        for task in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError, FileNotFoundError), open(f"/proc/self/task/{task}/schedstat") as file:
                times[int(task)] = int(file.read().split()[1])
    return times
