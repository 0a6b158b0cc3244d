"""Whatever is cut, emptied, changed or removed of a run directory: it is told or comes to nothing, and never hides
another run or ends in a traceback.

Three runs (supervised, online, generation) are cut off in the middle, and brought to their end; each is then damaged in
every file, one after another, and every time `status`, `runs` and `run` are asked.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.rollout.reward import call
from postlude.rollout.reward_pool import RewardPool
from postlude.stages.generation import Generation
from postlude.training.trainer import Trainer
from results import stage_differences
from stages.conftest import write_random_model
from workflow.conftest import Done, Project

DAMAGES = ("cut", "emptied", "removed")
"""What is done to files, and that a byte is changed: to each file all of it, and two bytes, with POSTLUDE_TEST_DAMAGES
set; else one byte, and one of these in turn."""
TOLD = ("alarm", "checkpoint_skipped")


class CutOff(Exception):
    """The run ends here."""


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises when it was called so often."""
    left = iter(range(calls))

    def call_or_raise(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise CutOff
        return function(*arguments)

    return call_or_raise


def supervised(project: Project, model: str) -> None:
    project.stage |= {"steps": 5, "checkpoint": {"every": 2}, "evaluate": {"data": {"held": 1.0}, "every": 2}}
    project.manifest["data"]["held"] = {**project.data, "limit": 4}


def online(project: Project, model: str) -> None:
    project.stage |= {
        "recipe": "grpo",
        "model": {"path": model},
        "steps": 5,
        "checkpoint": {"every": 2},
        "rollout": {"prompts": 4, "max_tokens": 4},
        "updates": 2,
        "group": 2,
        "reward": [{"function": {"name": "regex", "pattern": "[a-m]"}}],
    }
    del project.stage["tokenizer"]


def generation(project: Project, model: str) -> None:
    project.manifest["stages"] = {
        "sft": {
            "recipe": "generate",
            "model": {"path": model},
            "data": {"chats": 1.0},
            "max_tokens": 3,
            "concurrency": 8,
            "threads": 1,
        }
    }


CUT_OFF = {supervised: (Trainer, "train", 4), online: (Trainer, "train", 4), generation: (Generation, "do", 3)}


@dataclass
class Case:
    """A run, the result that it has undisturbed, and another run that stands beside it."""

    project: Project
    master: Path
    """A copy of the run directory, never damaged."""
    calm: Path
    """The undisturbed run's directory."""
    beside: Path
    is_finished: bool

    @property
    def place(self) -> Path:
        return Path(self.project.run.uri)

    def restore(self) -> None:
        shutil.rmtree(self.place.parent, ignore_errors=True)
        shutil.copytree(self.master, self.place)
        shutil.copytree(self.beside, self.place.parent / "healthy")

    def files(self) -> list[str]:
        paths = (path for path in self.master.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.master)) for path in paths)

    def differences(self) -> list[str]:
        try:
            return list(stage_differences(self.calm, self.place, "sft"))
        except Exception as error:  # of what is damaged
            return [f"cannot be compared: {error!r}"]

    def told(self) -> set[str]:
        """The alarms, as text: those of events that can be read."""
        lines = (self.place / "events.jsonl").read_bytes().splitlines() if self.place.exists() else []
        return {line.decode(errors="replace") for line in lines if any(f'"{k}"'.encode() in line for k in TOLD)}


def cases_of(prepare: Callable[[Project, str], None], folder: Path) -> Iterator[Case]:
    """A run that was cut off in the middle, and the same run brought to its end."""
    project, calm, beside = Project(folder), folder / "calm" / "small", folder / "beside"
    prepare(project, write_random_model(folder / "model", 1))
    project.manifest["run_dir"] = str(folder / "calm")
    assert project("run", "MANIFEST").exit_code == 0
    shutil.copytree(calm, beside)
    (beside / "stages/sft/model" / storage.MARKER).unlink()  # so that nothing can be taken over from it
    project.manifest["run_dir"] = str(folder / "runs")
    owner, method, calls = CUT_OFF[prepare]
    with pytest.MonkeyPatch.context() as cut:
        cut.setattr(owner, method, after(calls, getattr(owner, method)))
        with pytest.raises(CutOff):
            project("run", "MANIFEST")
    for is_finished in (False, True):
        case = Case(project, folder / f"master {is_finished}", calm, beside, is_finished)
        if is_finished:
            shutil.rmtree(case.place)
            shutil.copytree(folder / "master False", case.place)
            assert project("run", "MANIFEST").exit_code == 0
            assert case.differences() == []
        shutil.copytree(case.place, case.master)
        yield case


def damage(path: Path, how: str, chance: random.Random) -> None:
    content = path.read_bytes()
    match how:
        case "removed":
            path.unlink()
        case "emptied":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: chance.randrange(max(len(content), 1))])
        case "changed" if content:
            place = chance.randrange(len(content))
            path.write_bytes(
                content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]
            )


def try_damage(case: Case, name: str, how: str, chance: random.Random) -> str | None:
    """Damage a file, ask the three commands, and say what is wrong with what they did."""
    case.restore()
    before = case.told()
    damage(case.place / name, how, chance)
    said: list[Done] = []
    for command in (("status", "RUN"), ("runs", str(case.place.parent)), ("run", "MANIFEST")):
        try:
            said.append(case.project(*command))
        except Exception as error:  # a traceback is what is looked for
            return f"postlude {command[0]}: {error!r}"
    if trace := next((done for done in said if "Traceback" in done.out + done.err), None):
        return f"a traceback: {trace}"
    status, runs, run = said
    if runs.exit_code or "healthy" not in runs.out:
        return f"postlude runs: {runs}"
    if status.exit_code and not status.err.startswith("Error: "):
        return f"postlude status: {status}"
    different = case.differences()
    is_told = bool(case.told() - before or "\nError: " in f"\n{run.err}")
    if different and not is_told:
        return f"silent: {different[:3]}"
    may_be_lost = "examples/" in name or case.is_finished
    if different and not may_be_lost:
        return f"not bitwise: {different[:3]}; {run.err}"
    if run.exit_code and not case.is_finished:
        return f"does not end: {run.err}"
    return None


@pytest.mark.long
@pytest.mark.capability("Damage to any file of a run directory is told or mended, never believed")
@pytest.mark.parametrize("prepare", CUT_OFF)
def test_every_damage_is_told_or_comes_to_nothing(
    prepare: Callable[[Project, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process for a regular expression of ours takes longer than all the rest.
    monkeypatch.setattr(
        RewardPool,
        "score",
        lambda self, function, name, asked: [
            call(function, name, prompt.example_id, prompt.asked, text, dict(prompt.rewarded_record))
            for prompt, text in asked
        ],
    )
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no power fails
    is_whole, tried, faults = bool(os.environ.get("POSTLUDE_TEST_DAMAGES")), 0, {}
    for case in cases_of(prepare, tmp_path):
        for place, file in enumerate(case.files()):
            some = (DAMAGES[place % len(DAMAGES)], "changed")
            for number, how in enumerate((*DAMAGES, "changed", "changed") if is_whole else some):
                tried += 1
                what = f"{case.is_finished} {file} {how} {number}"
                fault = try_damage(case, file, how, random.Random(what))
                if fault is not None:
                    faults[what] = fault
    print(f"{tried} damages")
    assert tried
    assert not faults, json.dumps(faults, indent=1)


# --- one by one ---------------------------------------------------------------------------------------------


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.capability("A damaged artifact that is named by its path is refused by every command")
def test_a_damaged_artifact_named_by_its_path_is_refused(project: Project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    artifact = project.sft.artifact
    weights = Path(artifact, "model.safetensors")
    whole = weights.read_bytes()
    flip(weights)
    project.manifest["name"] = "second"
    project.stage["model"] = {"path": artifact}
    del project.stage["tokenizer"]
    commands = [
        ("run", "MANIFEST"),
        ("validate", "MANIFEST"),
        ("generate", artifact, "--prompt", "x"),
        ("verify", artifact),
        ("export", artifact.removesuffix("/model").replace("/stages", ""), str(weights.parents[4] / "out")),
    ]
    for command in commands:
        done = project(*command)
        assert done.exit_code == 1, command
        said = " ".join((done.out + done.err).split())
        names_it = "model.safetensors: changed" if command[0] == "verify" else "model.safetensors' is damaged"
        assert names_it in said, command
    weights.write_bytes(whole)
    assert project("run", "MANIFEST").exit_code == 0


@pytest.mark.parametrize("is_committed", [True, False])
def test_data_named_by_a_path_are_compared_where_they_were_committed(project: Project, is_committed: bool) -> None:
    place = f"{project.manifest['run_dir']}/records"
    with storage.new_folder(place) as folder:
        storage.write_bytes(f"{folder}/records.jsonl", project.chats.read_bytes())
    if not is_committed:
        storage.remove(f"{place}/{storage.MARKER}")
    project.data["source"] = {"path": f"{place}/*.jsonl"}
    project.stage["steps"] = 1
    storage.write_bytes(f"{place}/records.jsonl", project.chats.read_bytes().replace(b"Say 5.", b"Say 6."))
    done = project("run", "MANIFEST")
    assert done.exit_code == int(is_committed)
    assert ("records.jsonl' is damaged" in done.err) == is_committed


def test_the_base_of_an_adapter_is_looked_at_as_well(project: Project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    base = project.sft.artifact
    project.manifest["name"] = "adapted"
    project.stage |= {"model": {"path": base}, "adapter": {"kind": "lora", "rank": 2}}
    del project.stage["tokenizer"]
    assert project("run", "MANIFEST").exit_code == 0
    flip(Path(base, "model.safetensors"))
    assert "model.safetensors' is damaged" in project("generate", project.sft.artifact, "--prompt", "x").err


def test_a_finished_artifact_that_is_damaged_is_told_with_the_remedy(project: Project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    flip(Path(project.sft.artifact, "model.safetensors"))
    done = project("run", "MANIFEST")
    assert done.exit_code == 1
    assert "--from sft" in done.err
    assert project("run", "MANIFEST", "--from", "sft").exit_code == 0


def test_lines_that_the_checkpoint_stands_for_are_written_again(project: Project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    calm = list(project.sft.metrics.lines())
    project.as_if_killed()
    path = Path(project.sft.metrics.uri)
    path.write_bytes(b"".join(calm[:3]) + calm[3][:20])
    assert "damaged" in project("runs", project.manifest["run_dir"]).out
    assert project("run", "MANIFEST").exit_code == 0
    assert list(project.sft.metrics.lines()) == calm
    (alarm,) = project.told("alarm")
    assert alarm["what"] == "lines written again"


def test_lines_that_no_checkpoint_has_are_told_and_training_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postlude.storage.extent.TAIL_BYTES", 0)
    assert project("run", "MANIFEST").exit_code == 0
    lines = list(project.sft.metrics.lines())
    project.as_if_killed(keep=2)
    Path(project.sft.metrics.uri).write_bytes(b"".join(lines[1:]))
    assert project("run", "MANIFEST").exit_code == 0
    assert [alarm["what"] for alarm in project.told("alarm")] == ["lines are lost"]
    assert [event["step"] for event in project.told("checkpoint_skipped")] == [2]
    assert project.told("stage_started")[-1]["from_step"] == 2


def test_a_lost_identity_is_that_of_the_manifest_where_the_state_proves_it(project: Project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    whole = storage.read_bytes(project.sft.identity_uri)
    storage.remove(project.sft.identity_uri)
    assert project("run", "MANIFEST").exit_code == 0
    assert storage.read_bytes(project.sft.identity_uri) == whole
    project.stage["steps"] = 5
    storage.write_bytes(project.sft.identity_uri, b"")
    assert "what it was begun with is not known" in project("run", "MANIFEST", "--dry-run").out


def test_a_change_of_the_running_stage_that_was_lost_stops_it(project: Project) -> None:
    assert project("run", "MANIFEST").exit_code == 0
    project.as_if_killed(keep=2)
    project.sft.amendments.append({"id": 0, "assignment": "optimizer.lr=0.1"}, sync=True)
    path = Path(project.sft.amendments.uri)
    path.write_bytes(path.read_bytes().replace(b"lr=0.1", b"lr=0.2"))
    done = project("run", "MANIFEST")
    assert done.exit_code == 1
    assert "--from sft" in done.err
    assert "amendments.jsonl" in done.err
