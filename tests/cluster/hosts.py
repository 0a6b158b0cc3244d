"""Several hosts on one machine: each has a network of its own, so that what passes between them crosses a wire.

A host is a network namespace with one link to a bridge. A link can be cut, a host be killed with all that runs on it,
and the bridge be listened to. It takes root and iproute2.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

EVERY_PROTOCOL = 0x0003
PATIENCE_SECONDS = 600.0
"""A wait that is longer has failed; how fast a machine is plays no part."""


def can_be_made() -> bool:
    """Whether this machine allows network namespaces."""
    name = f"try{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Hosts 1 to ``count``. A context manager: on leaving nothing of them is left."""

    def __init__(self, count: int) -> None:
        self._mark = f"{os.getpid() % 10000:04d}"
        self._net = f"10.{60 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self._bridge = f"pb{self._mark}"
        self._count = count

    def __enter__(self) -> Hosts:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number in range(1, self._count + 1):
            space, outer = self._space(number), self._link(number)
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", self._bridge, "up")
            for what in (
                ["addr", "add", f"{self.address(number)}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["link", "set", "lo", "up"],
            ):
                _ip("-n", space, *what)
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(1, self._count + 1):
            self.kill(number)
            with suppress(subprocess.CalledProcessError):
                _ip("link", "del", self._link(number))
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self._space(number))
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)

    def _space(self, number: int) -> str:
        return f"ph{self._mark}-{number}"

    def _link(self, number: int) -> str:
        return f"pv{self._mark}-{number}"

    def address(self, number: int) -> str:
        """The IP address of a host."""
        return f"{self._net}.{number}"

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """A command as one that runs on a host."""
        return ["ip", "netns", "exec", self._space(number), *command]

    def pids(self, number: int) -> list[int]:
        """The processes of a host."""
        found = subprocess.run(["ip", "netns", "pids", self._space(number)], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    def kill(self, number: int) -> None:
        """Kill all that runs on a host."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (pids := self.pids(number)) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut(self, number: int) -> None:
        """Take the link of a host down: nothing reaches it, and it reaches nobody."""
        _ip("link", "set", self._link(number), "down")

    def heal(self, number: int) -> None:
        """Take it up again."""
        _ip("link", "set", self._link(number), "up")

    def wire(self, number: int) -> Wire:
        """Listen to all that crosses the link of a host."""
        return Wire(self._link(number))


class Wire:
    """Keeps the bytes that cross a link. A context manager."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(EVERY_PROTOCOL))
        self._socket.bind((interface, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 2**20)
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self.seen = bytearray()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def _listen(self) -> None:
        while not self._over.is_set():
            with suppress(TimeoutError):
                self.seen += self._socket.recv(65536)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


class RayOnHosts:
    """A Ray cluster with its head on host 1, which has no room for workers, and a node on each other host.

    ``cpus`` of each node; ``environment`` gives the variables of a host's Ray that are not those of every test.
    """

    def __init__(
        self,
        hosts: Hosts,
        folder: Path,
        cpus: Mapping[int, int],
        environment: Callable[[int], Mapping[str, str]] = lambda number: {},
    ) -> None:
        self.hosts, self._folder, self._cpus = hosts, folder, cpus
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._on_host = environment
        self._started: list[subprocess.Popen[bytes]] = []
        self._ray(1, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}")
        self.until_nodes(1)
        for number in cpus:
            self.join(number)
        self.until_nodes(1 + len(cpus))

    @property
    def address(self) -> str:
        return f"{self.hosts.address(1)}:6379"

    def join(self, number: int) -> None:
        """Start the Ray of a host, as a node of the cluster."""
        self._ray(number, f"--address={self.address}", f"--num-cpus={self._cpus[number]}")

    def _ray(self, number: int, *arguments: str) -> None:
        here = f"--node-ip-address={self.hosts.address(number)}"
        store = f"--object-store-memory={80 * 2**20}"
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, here, store, "--block"]
        if number != 1:  # each host has a folder of its own where Ray looks for what its node is
            own = Path(f"{self._folder}-{number}-{len(self._started)}")
            own.mkdir()
            start = ["unshare", "--mount", "sh", "-c", f"mount --bind {own} {self._folder} && exec {shlex.join(start)}"]
        command = self.hosts.command(number, start)
        log = (self._folder.parent / f"host-{number}.log").open("ab")
        self._started.append(subprocess.Popen(command, env=self._of(number), stdout=log, stderr=log))

    def _of(self, number: int) -> dict[str, str]:
        return {**self.environment, **self._on_host(number)}

    def nodes(self) -> int:
        """How many nodes are alive, asked from host 1."""
        asked = "import ray, sys; ray.init(sys.argv[1], configure_logging=False, log_to_driver=False)"
        asked += "; print(sum(node['Alive'] for node in ray.nodes()))"
        command = self.hosts.command(1, [sys.executable, "-c", asked, self.address])
        done = subprocess.run(command, env=self._of(1), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        return int(done.stdout.split()[-1]) if done.returncode == 0 else 0

    def until_nodes(self, count: int) -> None:
        """Wait until so many nodes are alive."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.nodes() < count:
            assert time.monotonic() < deadline, "the nodes did not come up"
            time.sleep(0.5)

    def close(self) -> None:
        for number in (1, *self._cpus):
            self.hosts.kill(number)
        for process in self._started:
            process.wait()
