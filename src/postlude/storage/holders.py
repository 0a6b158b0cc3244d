"""Who holds a lock: a process of a machine, told apart from a later one that has its number."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache
from typing import Any

import psutil


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    since: str
    """ISO 8601, UTC."""
    started: int | None = None
    """When the process began, in the kernel's ticks since the machine did: no clock that is set changes it. None where
    it is not known: written down by an earlier version, or by a system that does not tell."""
    machine: str | None = None
    """Which boot of which machine, and which space of process numbers: hosts may share a name, as containers do."""
    leaving: bool = False
    """Whether it stops with a checkpoint and lets go, because its lock file was removed."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @staticmethod
    def this_process() -> Holder:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Holder(socket.gethostname(), os.getpid(), now, _started(os.getpid()), this_machine())

    @staticmethod
    def read(record: Mapping[str, Any]) -> Holder:
        """As it was written down. ValueError if that is no holder."""
        known = {field.name: record[field.name] for field in fields(Holder) if field.name in record}
        try:
            return Holder(**known)
        except TypeError as error:
            raise ValueError(f"{error}") from error

    def process(self) -> psutil.Process | None:
        """The process, if it is of this machine and alive, and not a later one with its number. One whose start was not
        written down is taken for that which has its number."""
        is_here = self.host == socket.gethostname() if self.machine is None else self.machine == this_machine()
        try:
            process = psutil.Process(self.pid) if is_here else None
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process if self.started in (None, _started(self.pid)) else None

    def send(self, signal: int, only_if_certain: bool = False) -> bool:
        """Send its process a signal. False if there is no such process here, or if it is not certain that it is the
        one: its start was not written down."""
        process = self.process()
        if process is None or (only_if_certain and self.started is None):
            return False
        with suppress(psutil.NoSuchProcess):  # it has just ended
            process.send_signal(signal)
        return True

    def is_gone(self) -> bool:
        """Whether it is known to be dead: it was a process of this machine."""
        return self.machine is not None and self.machine == this_machine() and self.process() is None


@cache
def this_machine() -> str | None:
    """This boot of this machine, and the space that its process numbers are of; None where the kernel tells neither."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return None
