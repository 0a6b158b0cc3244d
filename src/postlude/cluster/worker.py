"""The process of one rank: an actor that works in one thread and answers in another.

Notable:

- It dies with its node's Ray, and so with the controller where that started Ray itself.
- While it works it holds a lease that every look renews. Once nobody has looked for too long it ends itself: a worker
  on a machine that was cut off must not write beside the one that took its place.
- SIGTERM is a notice that the machine goes away: the rank stops with a checkpoint, and says why.
- What it shows goes to a relay, which the controller empties with each look at it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import psutil
import ray

from postlude.cluster.failure import Outcome, outcome_of
from postlude.processes import die_with_parent
from postlude.secrecy import name_to_children
from postlude.storage import rules
from postlude.telemetry import openmp
from postlude.telemetry.guard import guard_streams
from postlude.telemetry.progress import console
from postlude.telemetry.pulse import Pulse, pulse, stack
from postlude.telemetry.readings import Reading, read
from postlude.telemetry.relay import Relay, Relayed
from postlude.training.interruption import Interruption


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know of the place that it was started from."""

    name: str
    """What it works on: a word for logs."""
    threads: int
    environment: Mapping[str, str] = field(repr=False)
    """Variables, set before anything heavy is imported."""
    modules: Sequence[str] = ()
    """To be imported before the work begins: what is heavy is over when the ranks begin together."""
    folder: str = field(default_factory=os.getcwd)
    """The working directory, by default that of this process."""
    path: Sequence[str] = field(default_factory=lambda: [entry for entry in sys.path if entry])
    """Where modules are looked for, by default where this process does."""
    width: int = field(default_factory=lambda: console().width)
    """Columns of the terminal that shows what it prints, by default that of this process."""
    rules: tuple[rules.Rule, ...] = field(default_factory=rules.current)
    """What places need, by default as in this process."""

    def enter(self) -> None:
        """Make it that of this process."""
        with contextlib.suppress(OSError):  # another machine may have no such folder
            os.chdir(self.folder)
        sys.path.extend(entry for entry in self.path if entry not in sys.path and os.path.isdir(entry))
        os.environ.update({"OMP_NUM_THREADS": str(self.threads), **self.environment})
        name_to_children(self.environment)
        rules.use(self.rules)
        guard_streams()
        openmp.wait_shortly()


@dataclass(frozen=True)
class Address:
    """Where a worker runs."""

    host: str
    """IP address of its node."""
    node: str
    """Ray's id of the node."""
    pid: int
    free_port: int
    """A port that was free a moment ago."""


@dataclass(frozen=True)
class Look:
    """What the controller sees of a worker."""

    pulse: Pulse
    relayed: Relayed
    noticed: bool
    """Whether its machine was said to go away."""
    reading: Reading


class Worker:
    """One rank. ``take_place`` comes first, then ``work``."""

    def __init__(self, rank: int, setup: WorkerSetup) -> None:
        die_with_parent()
        setup.enter()
        self._rank, self._setup = rank, setup
        self._stop, self._relay = Interruption(), Relay()
        self._noticed = False
        self._lease = Lease()
        _on_terminate(self._notice)

    def __repr__(self) -> str:  # what Ray puts before a line that the process prints
        return f"{self._setup.name}:{self._rank}"

    # --- work -----------------------------------------------------------------------------------------------

    def take_place(self, world: int, place_on_node: int, meeting: str, interface: str | None) -> None:
        """Learn the other ranks: how many, this one's number on its node, and where they meet (host:port)."""
        host, port = meeting.rsplit(":", 1)
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(world), LOCAL_RANK=str(place_on_node))
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
        interface = interface or _interface_of(ray.util.get_node_ip_address())
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        openmp.compute_with(self._setup.threads)
        for module in self._setup.modules:
            importlib.import_module(module)
        self._relay.take_console(self._setup.width)

    def work(self, function: str, task: Any, lease_seconds: float) -> Outcome:
        """Call ``function`` ("module:name") with the task, the request to stop and a display, to its end."""
        host = socket.gethostname()
        with self._lease.hold(lease_seconds):
            try:
                return Outcome(self._rank, resolve_name(function)(task, self._stop, self._relay), host=host)
            except BaseException as error:
                return outcome_of(self._rank, host, error)

    # --- while it works, from another thread ----------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def address(self) -> Address:
        """Where it runs."""
        context = ray.get_runtime_context()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return Address(ray.util.get_node_ip_address(), context.get_node_id(), os.getpid(), port)

    @ray.method(concurrency_group="control")
    def look(self) -> Look:
        """How it gets on, and what it has to show since the last look."""
        self._lease.renew()
        return Look(pulse(), self._relay.take(), self._noticed, read())

    @ray.method(concurrency_group="control")
    def stop(self, at_checkpoint: bool = False) -> None:
        """Ask it to stop after the step in progress, or after the next checkpoint."""
        self._stop.request(at_checkpoint)

    @ray.method(concurrency_group="control")
    def stack(self) -> str:
        """Where it is at this moment."""
        return stack()

    def _notice(self) -> None:
        self._noticed = True
        self._stop.request()


class Lease:
    """Ends this process when it is held and has not been renewed for its time."""

    def __init__(self) -> None:
        self._renewed = time.monotonic()
        self._over = threading.Event()

    def renew(self) -> None:
        """Begin its time anew."""
        self._renewed = time.monotonic()

    @contextlib.contextmanager
    def hold(self, seconds: float) -> Iterator[None]:
        """Hold it, for so long after each renewal."""
        self.renew()
        self._over.clear()
        threading.Thread(target=self._watch, args=(seconds,), name="lease", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(min(0.5, seconds / 4)):
            if time.monotonic() - self._renewed > seconds:
                os._exit(1)


def _on_terminate(notice: Callable[[], None]) -> None:
    """Call ``notice``, from a thread, when SIGTERM comes. The main thread is Ray's, and runs no handlers of Python."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while True:
            if signal.SIGTERM in os.read(reader, 64):
                notice()

    threading.Thread(target=listen, name="notices", daemon=True).start()


def _interface_of(address: str) -> str | None:
    """The network interface that has an IP address, by which collectives reach the others."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if any(each.address == address for each in known)), None)
