"""``postlude flow``: the graph of stages as a Metaflow flow, whose steps call ``postlude run``.

Metaflow joins what it splits, so that not every graph is a flow as it stands. The graph is taken apart instead: parts
that do not hang together are branches, joined when all have ended; of a part that does, its first stages come first,
then what is left. A stage may thus wait for more than it needs, never for less.

Two steps do not work on one run at the same time: each ``postlude run`` holds it and lets the others wait, which say
so. For stages side by side there are pools, within one ``postlude run``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from postlude import storage
from postlude.manifest.graph import needs, order
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.secrecy import told

WAIT_SECONDS = 7 * 24 * 3600
"""How long a step waits for the one that holds the run."""

_HEADER = '''\
"""The stages of the run '{name}' as a Metaflow flow. Written by `postlude flow`; run it with: python {file} run"""

import subprocess
import sys

from metaflow import FlowSpec, step

MANIFEST = {manifest!r}
OVERRIDES = {overrides!r}


def run(stage):
    """Run one stage. What it needs is done by then; a branch that holds the run is waited for."""
    command = [sys.executable, "-P", "-m", "postlude", "run", MANIFEST, *OVERRIDES]
    subprocess.run([*command, "--stage", stage, "--wait", "{wait}"], check=True)


class {flow}(FlowSpec):
'''

_STEP = """
    @step
    def {name}(self{inputs}):
        {work}
        self.next({following})
"""

_END = """
    @step
    def end(self):
        pass


if __name__ == "__main__":
    {flow}()
"""


def flow(manifest_path: str, overrides: Sequence[str], file: str = "flow.py") -> str:
    """The text of a Python file, to be called ``file``, that runs the stages of a manifest under Metaflow."""
    manifest = load(storage.read_bytes(manifest_path), manifest_path, overrides).manifest
    if told(list(overrides)) != list(overrides):
        raise ManifestError(
            "One of the KEY=VALUE holds a secret, and the flow would hold it, too. Name it in the manifest instead: "
            "compute.environment: {NAME: {from: environment}}."
        )
    graph = {name: needs(manifest, name) for name in order(manifest)}
    class_name = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", manifest.name)) + "Flow"
    if class_name[0].isdigit():
        class_name = f"Run{class_name}"
    writer = _Writer(_step_names(graph))
    writer.follow("start", "pass", "end", take_apart(graph))
    header = _HEADER.format(
        name=manifest.name,
        file=storage.name(file),
        manifest=manifest_path,
        overrides=list(overrides),
        wait=WAIT_SECONDS,
        flow=class_name,
    )
    return header.rstrip() + "\n" + "".join(writer.steps) + _END.format(flow=class_name)


@dataclass(frozen=True)
class Branches:
    """Chains that do not need each other."""

    chains: list[list[str | Branches]]


def take_apart(graph: Mapping[str, Sequence[str]]) -> list[str | Branches]:
    """The graph as a chain of stages and of branches that are chains themselves."""
    if not graph:
        return []
    parts = _parts(graph)
    if len(parts) > 1:
        return [Branches([take_apart(part) for part in parts])]
    first = [name for name, needed in graph.items() if not any(need in graph for need in needed)]
    rest = {name: needed for name, needed in graph.items() if name not in first}
    head: list[str | Branches] = [first[0]] if len(first) == 1 else [Branches([[name] for name in first])]
    return head + take_apart(rest)


def _parts(graph: Mapping[str, Sequence[str]]) -> list[dict[str, Sequence[str]]]:
    """The parts of a graph that do not hang together, in the order of their first stages."""
    left, parts = dict(graph), []
    while left:
        part = {next(iter(left))}
        while True:
            near = {name for name, needed in left.items() if name in part or part & set(needed)}
            near |= {need for name in near for need in left[name] if need in left}
            if near == part:
                break
            part = near
        parts.append({name: left[name] for name in left if name in part})
        left = {name: needed for name, needed in left.items() if name not in part}
    return parts


def _step_names(names: Iterable[str]) -> dict[str, str]:
    """A name of Python for the step of each stage."""
    steps: dict[str, str] = {}
    for name in names:
        step = "stage_" + re.sub(r"\W", "_", name)
        while step in steps.values():
            step += "_"
        steps[name] = step
    return steps


@dataclass
class _Writer:
    """Writes steps, each with what follows it."""

    names: Mapping[str, str]
    steps: list[str] = field(default_factory=list)
    _joins: int = 0

    def follow(self, step: str, work: str, end: str, chain: Sequence[str | Branches], inputs: str = "") -> None:
        """Write a step, then the chain that follows it, which leads to the step ``end``."""
        if not chain:
            self._write(step, work, f"self.{end}", inputs)
            return
        head, rest = chain[0], chain[1:]
        if isinstance(head, str):
            self._write(step, work, f"self.{self.names[head]}", inputs)
            self.follow(self.names[head], f"run({head!r})", end, rest)
            return
        self._joins += 1
        join = f"join_{self._joins}"
        branches: list[tuple[str, str, Sequence[str | Branches]]] = []
        for number, (begin, *more) in enumerate(head.chains, start=1):
            if isinstance(begin, str):
                branches.append((self.names[begin], f"run({begin!r})", more))
            else:  # a branch that begins with branches of its own needs a step to split at
                branches.append((f"branch_{self._joins}_{number}", "pass", [begin, *more]))
        self._write(step, work, ", ".join(f"self.{first}" for first, _, _ in branches), inputs)
        for first, first_work, following in branches:
            self.follow(first, first_work, join, following)
        self.follow(join, "pass", end, rest, inputs=", inputs")

    def _write(self, step: str, work: str, following: str, inputs: str) -> None:
        self.steps.append(_STEP.format(name=step, inputs=inputs, work=work, following=following))
