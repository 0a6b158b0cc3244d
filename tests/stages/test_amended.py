"""A stage that was amended and cut off makes, to the last bit, what it makes with the same amendments undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from postlude.training.trainer import Trainer
from postlude.workflow.amend import amend, look
from postlude.workflow.checkpoint import ask_for_checkpoint
from stages.conftest import Project, chat

Asked = Mapping[int, Sequence[str]]
"""What is asked for after a step, in which nobody looks for it."""
TIMED = ("seconds", "busy", "tokens_per_second", "memory_bytes", "mfu")


@pytest.fixture
def project_of(tmp_path: Path, models: dict[str, str]) -> Callable[[str], Project]:
    def make(name: str) -> Project:
        folder = tmp_path / name
        folder.mkdir()
        project = Project(folder, models)
        # The fingerprints of two folders with the same records are the same.
        project.data["more"] = project.written("more", [chat(f"Say {n}.", f"{n}, {n}.") for n in range(30)])
        return project

    return make


class CutOff(RuntimeError):
    """In place of a kill."""


def run(project: Project, monkeypatch: pytest.MonkeyPatch, asked: Asked, cuts: Sequence[int] = ()) -> None:
    """Run to the end, with what is asked for, begun again each time that it is cut off when it has made these steps."""
    train, left, waiting = Trainer.train, list(cuts), dict(asked)

    def disturbed(self: Trainer, work: Any) -> None:
        train(self, work)
        for assignment in waiting.pop(self.step, ()):
            if assignment == "checkpoint":
                ask_for_checkpoint(project.directory.uri, "one")
            else:
                amend(project.directory.uri, "one", assignment, by="somebody")
        if left and self.step == left[0]:
            left.pop(0)
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", disturbed)
        for _ in cuts:
            with pytest.raises(CutOff):
                project.run()
        assert project.run() == 0
    assert not waiting
    assert not left


def result(project: Project) -> dict[str, Any]:
    """All that a stage leaves, but for times."""
    stage = project.directory.stage("one")
    rows = stage.read_examples().to_pylist()
    return {
        "metrics": [
            {key: value for key, value in line.items() if not key.startswith(TIMED)} for line in stage.metrics.read()
        ],
        "rollouts": stage.rollouts.read(),
        "examples": sorted(rows, key=lambda row: (row["step"], row["source"], row["example_id"])),
        "weights": Path(stage.artifact, "model.safetensors").read_bytes(),
        "applied": stage.applied_amendments(),
    }


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Tells the first line that differs, and how."""
    for name in ("applied", "metrics", "rollouts", "examples"):
        for a, b in zip(one[name], other[name], strict=True):
            differs = (
                {key: (a[key], b.get(key)) for key in a if a[key] != b.get(key)} if isinstance(a, dict) else a != b
            )
            assert not differs, (name, a, b)
    assert one["weights"] == other["weights"]


def same(
    project_of: Callable[[str], Project],
    monkeypatch: pytest.MonkeyPatch,
    stage: dict[str, Any],
    asked: Asked,
    cuts: Sequence[int],
) -> dict[str, Any]:
    """What the stage makes, undisturbed and cut off alike; that is another thing than without the amendments."""
    results = []
    for name, steps in (("whole", ()), ("cut", cuts)):
        project = project_of(name)
        project.stages["one"] = stage
        run(project, monkeypatch, asked, steps)
        results.append(result(project))
    assert_same(*results)
    return results[0]


def of(told: Mapping[str, Any], name: str) -> list[Any]:
    return [line[name] for line in told["metrics"]]


@pytest.mark.capability("Whatever may be amended holds from its step on, bitwise the same after any kill")
def test_sft(project_of, monkeypatch, models) -> None:
    stage = {
        "recipe": "sft",
        "model": {"path": models["one"]},
        "data": {"asked": 1.0, "more": 0.9},
        "steps": 10,
        "threads": 1,
        "batch": {"tokens": 128, "block": 128, "window": 2},
        "optimizer": {"lr": 1e-2},
        "schedule": "constant",
        "checkpoint": {"every": 2, "keep": 9},
        "evaluate": {"data": {"more": 1.0}},
    }
    asked = {
        1: ["optimizer.betas=[0.5, 0.9]", "optimizer.eps=0.001"],
        3: ["data.more=1e-9", "schedule={name: linear, floor: 0.5}", "max_grad_norm=0.1", "evaluate.every=4"],
        6: ["data.more=1.0", "loss.normalize=document", "optimizer.lr=0.02"],
    }
    told = same(project_of, monkeypatch, stage, asked, cuts=[2, 4, 7, 9])
    steps = {assignment: step for step, assignment in told["applied"]}
    assert set(steps.values()) == {2, 4, 7}
    lr = of(told, "lr")
    assert lr[:3] == [0.01] * 3
    assert all(0.005 <= rate < 0.01 for rate in lr[3:6])
    assert all(0.01 <= rate < 0.02 for rate in lr[6:])
    assert [line["step"] for line in told["metrics"] if "eval_more_loss" in line] == [4, 8]
    sources = [{row["source"] for row in told["examples"] if row["step"] == step} for step in range(1, 11)]
    assert any("more" in drawn for drawn in sources[:4])
    assert not any("more" in drawn for drawn in sources[4:6])
    assert any("more" in drawn for drawn in sources[7:])


ONLINE = {
    "recipe": "grpo",
    "data": {"asked": 1.0, "more": 0.9},
    "steps": 8,
    "threads": 1,
    "batch": {"tokens": 4096, "block": 128},
    "optimizer": {"lr": 1e-2},
    "schedule": "constant",
    "rollout": {"prompts": 4, "max_tokens": 6},
    "group": 4,
    "updates": 2,
    "checkpoint": {"every": 4, "keep": 9},
    "reward": [
        {"function": {"name": "regex", "pattern": "[a-m]"}},
        {"function": {"name": "regex", "pattern": "[n-z]"}, "weight": 0.5},
    ],
}


@pytest.mark.capability("Amendments of online learning hold from a round on, bitwise the same after any kill")
def test_grpo(project_of, monkeypatch, models) -> None:
    """Rounds have two steps. What is asked for in the midst of one waits for the next, and so does what comes after."""
    stage = {**ONLINE, "model": {"path": models["one"]}, "kl": 0.1, "evaluate": {"data": {"more": 1.0}, "limit": 4}}
    asked = {
        1: ["clip=0.1", "rollout.temperature=0.7", "optimizer.lr=0.02"],
        4: ["reward.0.weight=3.0", "data.more=1e-9", "kl=0.0", "evaluate.every=6", "evaluate.temperature=1.0"],
        5: ["group=3", "rollout.prompts=6", "kl=0.2", "updates=1"],
    }
    told = same(project_of, monkeypatch, stage, asked, cuts=[3, 7, 8])
    steps = {assignment: step for step, assignment in told["applied"]}
    assert steps["clip=0.1"] == 2
    assert steps["rollout.temperature=0.7"] == steps["optimizer.lr=0.02"] == 3
    assert {steps[assignment] for assignment in asked[4]} == {5}
    assert {steps[assignment] for assignment in asked[5]} == {7}
    assert of(told, "lr") == [0.01] * 2 + [0.02] * 6
    rewards = {step: [line["reward"] for line in told["rollouts"] if line["step"] == step] for step in range(1, 9)}
    assert max(map(max, list(rewards.values())[:4])) <= 1.5
    assert set(rewards[5]) & {3.0, 3.5}
    trained = [line for line in told["rollouts"] if line.get("outcome") == "trained" and line["step"] == 7]
    assert len(trained) == 18
    assert {line["prompt_id"].partition(":")[0] for line in trained} == {"asked"}
    assert [line["step"] for line in told["metrics"] if "eval_more_reward" in line] == [6]


def test_ppo(project_of, monkeypatch, models) -> None:
    """What was adapted stays, unless it is amended itself; the critic's optimiser is amended like the policy's."""
    critic = {"optimizer": {"lr": 1e-3}}
    stage = {**ONLINE, "recipe": "ppo", "model": {"path": models["one"]}, "kl_target": 1e-4, "critic": critic}
    asked = {
        1: ["critic.optimizer.lr=0.0001", "entropy=0.01", "gae_lambda=0.5"],
        3: ["critic.coefficient=0.1"],
        5: ["kl=0.2"],
    }
    told = same(project_of, monkeypatch, {**stage, "passes": 1}, asked, cuts=[4, 7])
    adapted = of(told, "kl_coefficient")
    assert len({0.05, adapted[0], adapted[2], adapted[4]}) == 3
    assert adapted[6] == 0.2


def test_a_checkpoint_that_is_asked_for_changes_nothing_and_is_gone_on_from(project_of, monkeypatch, models) -> None:
    results = []
    for name, asked, cuts in (("plain", {}, ()), ("asked", {3: ["checkpoint"]}, (6,))):
        project = project_of(name)
        project.stages["one"] = project.train(
            steps=8, data={"asked": 1.0, "more": 0.9}, checkpoint={"every": 50}, optimizer={"lr": 1e-2}
        )
        run(project, monkeypatch, asked, cuts)
        results.append(result(project))
    assert_same(*results)
    stage = project.directory.stage("one")
    assert dict(stage.requests().checkpoints) == {0: 3}
    started = [event["from_step"] for event in project.directory.events.read() if event["kind"] == "stage_started"]
    assert started == [0, 3]
    assert stage.applied_amendments() == []


def test_an_undone_amendment_leaves_what_would_have_been_from_there_on(project_of, monkeypatch, models) -> None:
    project = project_of("one")
    project.stages["one"] = project.train(
        steps=6, data={"asked": 1.0, "more": 0.9}, schedule="constant", optimizer={"lr": 1e-2}
    )
    run(project, monkeypatch, {1: ["optimizer.lr=0.5"], 3: ["optimizer.lr=0.01"]})
    assert of(result(project), "lr") == [0.01, 0.5, 0.5, 0.01, 0.01, 0.01]
    seen = look(project.directory.uri, "one")
    assert [(each.number, each.from_step, each.by) for each in seen.amendments] == [
        (0, 2, "somebody"),
        (1, 4, "somebody"),
    ]
    assert "is done" in str(seen.refusal)
