"""A small project in a folder of its own: a manifest, its data, and the command line over both, in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postlude.cli import main
from postlude.runs import Run, Stage


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which must be one JSON document."""
        return json.loads(self.out)


class Project:
    """A manifest, as a tree to be changed by a test before a command reads it.

    It trains a model of some thousand parameters on 48 short conversations, in four steps of half a second in all.
    """

    NAME = "small"

    def __init__(self, folder: Path) -> None:
        self.chats = folder / "chats.jsonl"
        self.path = folder / "small.yaml"
        self.write_chats(chat(f"Say {n}.", f"{n}, {n} and {n}.") for n in range(48))
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.stage: dict[str, Any] = {
            "recipe": "sft",
            "model": {"new": {"architecture": "llama", "config": size}},
            "tokenizer": {"bytes": True},
            "data": {"chats": 1.0},
            "steps": 4,
            "batch": {"tokens": 512, "block": 128},
            "optimizer": {"lr": 1e-2},
            "threads": 1,
            "checkpoint": {"every": 2},
        }
        self.data: dict[str, Any] = {"source": {"path": str(self.chats)}, "format": "messages"}
        self.manifest: dict[str, Any] = {
            "name": self.NAME,
            "seed": 3,
            "run_dir": str(folder / "runs"),
            "data": {"chats": self.data},
            "stages": {"sft": self.stage},
        }

    def write_chats(self, records: Iterable[Any]) -> None:
        """Replace the conversations: one record a line."""
        self.chats.write_text("".join(json.dumps(record) + "\n" for record in records))

    def write(self) -> None:
        """Write the manifest as it is now."""
        self.path.write_text(json.dumps(self.manifest, indent=1))

    def __call__(self, *arguments: str) -> Done:
        """Run ``postlude`` in this process; ``MANIFEST`` stands for the manifest and ``RUN`` for the run.

        Stages run here, too, unless the manifest says what they run on.
        """
        self.write()
        if (
            arguments[0] == "run"
            and "compute" not in self.manifest
            and not any("compute" in each for each in arguments)
        ):
            arguments = (*arguments, "--inline")
        places = {"MANIFEST": str(self.path), "RUN": self.run.uri, "RUN/sft": f"{self.run.uri}/sft"}
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["postlude", *(places.get(argument, argument) for argument in arguments)])
            with pytest.raises(SystemExit) as done:
                main()
        return Done(int(done.value.code or 0), out.getvalue(), err.getvalue())

    # --- the run directory ----------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        return Run(f"{self.manifest['run_dir']}/{self.manifest['name']}")

    @property
    def sft(self) -> Stage:
        return self.run.stage("sft")

    @property
    def events(self) -> list[dict[str, Any]]:
        """What is in ``events.jsonl``."""
        return list(self.run.events.read())

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["kind"] == kind]

    def lines(self) -> list[dict[str, Any]]:
        """The metrics, without what the machine's mood decides."""
        fields = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "documents", "skipped")
        return [{name: line[name] for name in fields} for line in self.sft.metrics.read()]

    def as_if_killed(self, keep: int | None = None) -> None:
        """Leave the run as a kill just before its end leaves it; ``keep`` is the last step that has a checkpoint."""
        from postlude import storage

        storage.discard(self.sft.artifact)
        for checkpoint in self.sft.checkpoints():
            if keep is not None and checkpoint.step > keep:
                storage.discard(checkpoint.uri)
        self.sft.enter("running")


def chat(question: str, answer: str) -> dict[str, Any]:
    """A record of the format ``messages``."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def new_project() -> type[Project]:
    """For a project that several tests share."""
    return Project
