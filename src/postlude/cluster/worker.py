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
import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from postlude.cluster.failure import Outcome, outcome_of
from postlude.telemetry.pulse import Pulse, pulse, stack
from postlude.telemetry.readings import Reading, read
from postlude.telemetry.relay import Relay, Relayed
from postlude.training.interruption import Interruption


@dataclass(frozen=True)
class Setting:
    """What a worker needs to know of the place that it was started from."""

    name: str
    """What it works on: a word for logs."""
    folder: str
    """The working directory."""
    path: Sequence[str]
    """Where modules are looked for."""
    threads: int
    environment: Mapping[str, str]
    """Variables, set before anything heavy is imported."""
    modules: Sequence[str] = ()
    """To be imported before the work begins: what is heavy is over when the ranks begin together."""

    @staticmethod
    def here(name: str, threads: int, environment: Mapping[str, str], modules: Sequence[str] = ()) -> Setting:
        """As in this process."""
        return Setting(name, os.getcwd(), list(sys.path), threads, dict(environment), modules)

    def enter(self) -> None:
        """Make it that of this process."""
        with contextlib.suppress(OSError):  # another machine may have no such folder
            os.chdir(self.folder)
        sys.path.extend(entry for entry in self.path if entry not in sys.path and os.path.isdir(entry))
        os.environ.update({"OMP_NUM_THREADS": str(self.threads), **self.environment})


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
    """One rank. ``take_place`` comes first, then ``work`` or ``build`` and ``call``."""

    def __init__(self, rank: int, setting: Setting) -> None:
        die_with_parent()
        self._rank, self._name = rank, setting.name
        setting.enter()
        self._threads, self._modules = setting.threads, setting.modules
        self._stop, self._relay = Interruption(), Relay()
        self._noticed = False
        self._lease = Lease()
        self._built: Any = None
        _on_terminate(self._notice)

    def __repr__(self) -> str:  # what Ray puts before a line that the process prints
        return f"{self._name}:{self._rank}"

    # --- work -----------------------------------------------------------------------------------------------

    def take_place(self, world: int, place_on_node: int, meeting: str, interface: str | None) -> None:
        """Learn the other ranks: how many, this one's number on its node, and where they meet (host:port)."""
        host, port = meeting.rsplit(":", 1)
        told = {
            "RANK": self._rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": place_on_node,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in told.items()})
        interface = interface or _interface_of(ray.util.get_node_ip_address())
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        import torch

        torch.set_num_threads(self._threads)
        for module in self._modules:
            importlib.import_module(module)
        self._relay.take_console()

    def work(self, function: str, task: Any, lease_seconds: float) -> Outcome:
        """Call ``function`` ("module:name") with the task, the request to stop and a display, to its end."""
        with self._lease.held(lease_seconds):
            return self._outcome(lambda: loaded(function)(task, self._stop, self._relay))

    def build(self, what: str, *arguments: Any) -> Outcome:
        """Make the object whose methods :meth:`call` calls: ``what`` ("module:name") with the arguments."""

        def make() -> None:
            self._built = loaded(what)(*arguments)

        return self._outcome(make)

    def call(self, method: str, *arguments: Any) -> Outcome:
        """Call a method of the object that was built."""
        return self._outcome(lambda: getattr(self._built, method)(*arguments))

    def _outcome(self, what: Callable[[], Any]) -> Outcome:
        host = socket.gethostname()
        try:
            return Outcome(self._rank, what(), host=host)
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
    def held(self, seconds: float) -> Iterator[None]:
        """Hold it, for so long after each renewal."""
        self.renew()
        self._over.clear()
        threading.Thread(target=self._hold, args=(seconds,), name="lease", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _hold(self, seconds: float) -> None:
        while not self._over.wait(min(0.5, seconds / 4)):
            if time.monotonic() - self._renewed > seconds:
                os._exit(1)


def loaded(place: str) -> Any:
    """What stands at "module:name"."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def die_with_parent() -> None:
    """Have the kernel kill this process when Ray's process on the node dies, however it dies."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


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
    import fcntl
    import struct

    get_address = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(asked.fileno(), get_address, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
