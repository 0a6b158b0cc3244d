"""The process that a test is run under: it starts the judge, which builds the walls and starts the program within;
keeps the limits of the two together; and leaves nothing of them.

There are never more than these three processes. Program and judge are barred from starting others and from taking off
that they die with who started them, so that nothing is left whoever is killed.

It is told a JSON object as its argument, and the program and the test on standard input, which neither it nor the
program's process reads; its standard error has to be the null device, which becomes theirs. It answers with one
character: ``1`` the test has passed, ``0`` it has not.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from postlude.rollout.sandbox import judge, program, walls

REFUSED = 77
"""The exit status where the walls that are asked for cannot be had."""
START_SECONDS = 30.0
"""How long walls and judge may take to stand."""
LOOK_SECONDS = 0.02
"""How often is looked at what judge and program have together."""
_SCRATCH = 32


def main() -> int:
    """Run one test as the argument says."""
    order = json.loads(sys.argv[1])
    walls.die_with_parent(signal.SIGKILL)
    walls.adopt_orphans()
    if order["parent"] not in (0, os.getppid()):
        return 1
    try:
        _children(os.getpid())
        if order["walls"] == walls.NAMESPACES:
            walls.leave_machine()
    except OSError:
        return REFUSED
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        _judge(order, writes)
    os.close(writes)
    os.close(0)
    try:
        return _watch(order, child, reads)
    finally:
        _end(child)


def _watch(order: dict[str, Any], child: int, reads: int) -> int:
    """Wait for the verdict, as long as the limits hold."""
    told = b""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if select.select([reads], [], [], LOOK_SECONDS)[0]:
            new = os.read(reads, 1)
            if new == b"b":  # the walls stand
                deadline = time.monotonic() + order["seconds"]
                continue
            told = new
            break
        if _is_too_much(order, child):
            break
    if told == b"r":
        return REFUSED
    print("1" if told == b"1" else "0", end="", flush=True)
    return 0


def _is_too_much(order: dict[str, Any], child: int) -> bool:
    """Whether judge and program together have more than they may."""
    memory = threads = 0
    try:
        for process in (child, *_children(child)):
            with open(f"/proc/{process}/status") as file:
                fields = dict(line.split(":", 1) for line in file)
            memory += sum(int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap")) * 1024
            threads += int(fields.get("Threads", "0"))
    except OSError:  # one has ended
        pass
    if memory > order["memory_bytes"] or threads > walls.MOST_THREADS:
        return True
    return order["walls"] in (walls.LANDLOCK, walls.NOTHING) and _is_full(order["folder"])


def _children(process: int) -> list[int]:
    """What a process has started from its first thread. OSError where the kernel does not tell, or it has ended."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        return list(map(int, file.read().split()))


def _is_full(folder: str) -> bool:
    """Whether there are more files below a folder, or larger ones, than there may be."""
    size = count = 0
    for here, folders, names in os.walk(folder):
        count += len(folders) + len(names)
        for name in names:
            try:
                size += os.lstat(os.path.join(here, name)).st_blocks * 512
            except OSError:  # it is gone
                continue
        if size > walls.ALL_FILES or count > walls.MOST_FILES:
            return True
    return False


def _end(child: int) -> None:
    """Kill the judge, and with it the program, and wait until both are gone."""
    os.kill(child, signal.SIGKILL)
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return


def _judge(order: dict[str, Any], told: int) -> None:
    """The judge's process, which starts the program's. Tells what became of it and never returns."""
    verdict = b"r"
    try:
        ends = _within_walls(order, told)
        verdict = b"0"
        with open(0, "rb", closefd=False) as file:
            given = json.load(file)
        os.write(told, b"b")
        verdict = b"1" if judge.passes(*ends, given["program"], given["test"]) else b"0"
    finally:
        try:
            os.write(told, verdict)
        finally:
            os._exit(0)


def _within_walls(order: dict[str, Any], told: int) -> tuple[int, int]:
    """Build the walls round this process and start that of the program within them. The ends of the pipes by which
    the two talk. OSError where the walls cannot be had."""
    kind, folder = order["walls"], order["folder"]
    walls.die_with_parent(signal.SIGKILL)
    nothing = 2  # leads nowhere, and is at hand where there are no devices
    if kind == walls.NAMESPACES:
        walls.build_root(folder)
    elif kind == walls.LANDLOCK:
        walls.restrict(folder)
    theirs, ours = os.pipe(), os.pipe()
    with walls.new_processes() if kind == walls.NAMESPACES else nullcontext():
        if os.fork() == 0:
            try:
                _program(order, [nothing, nothing, nothing, theirs[0], ours[1]])
            finally:
                os._exit(1)
    os.close(theirs[0])
    os.close(ours[1])
    if os.read(ours[0], 1) != b"w":
        raise OSError("the walls do not stand")
    if kind == walls.NAMESPACES:
        os.chdir("/tmp")  # what was the current folder is of the root that is gone
    _confine(order)
    os.dup2(nothing, 1)
    return ours[0], theirs[1]


def _program(order: dict[str, Any], ends: Sequence[int]) -> None:
    """The program's process, which has nothing open but these, as its file descriptors from 0 on."""
    for place, end in enumerate(ends):
        os.dup2(end, _SCRATCH + place)
    for place in range(len(ends)):
        os.dup2(_SCRATCH + place, place, inheritable=place < 3)
    os.closerange(len(ends), _SCRATCH + len(ends))
    if order["walls"] == walls.NAMESPACES:
        walls.enter_root(order["folder"])
    elif order["walls"] == walls.LANDLOCK:  # a domain of its own, from which the judge's is not reached
        walls.restrict(order["folder"])
    _confine(order)
    os.write(4, b"w")
    program.serve(3, 4)


def _confine(order: dict[str, Any]) -> None:
    """Give up what this process needs not. Who started it is asked for something next: if it has ended before this one
    was to die with it, that fails."""
    walls.give_up_rights(order["walls"])
    walls.die_with_parent(signal.SIGKILL)
    walls.limit(order["walls"], order["seconds"], order["memory_bytes"])
