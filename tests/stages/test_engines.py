"""Engines in processes of their own: they answer as the policy itself does, ahead of it too, and may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import meshes
from postlude.errors import ComputeError
from postlude.manifest.component import lookup
from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from postlude.rollout.serving.external import ExternalEngine
from postlude.rollout.serving.server import SHARED_MEMORY
from postlude.runs import Run
from ranks import run_ranks
from stages.conftest import outcomes, write_random_model
from stages.test_online import lines, online, rollouts, run_cut_off

APART = {"name": "native", "apart": True}


def stage(project, **keys: Any) -> dict[str, Any]:
    """A stage that an external engine answers for."""
    rollout = {"prompts": 4, "max_tokens": 6, "engine": APART, **keys.pop("rollout", {})}
    return online(project, rollout=rollout, **keys)


def ran(project, name: str, stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a run of its own."""
    project.stages["rl"] = stage
    project.manifest |= {"name": name, "run_dir": str(project.folder / name)}
    assert project.run() == 0
    return lines(project)


def rooms(pid: int) -> list[Path]:
    """Those of the engines of a process."""
    return list(SHARED_MEMORY.glob(f"postlude-engine-{pid}-*"))


@pytest.mark.capability("A native engine in a process of its own")
@pytest.mark.parametrize("keys", [{}, {"adapter": {"rank": 4}}, {"adapter": {"rank": 4, "dora": True}}])
def test_an_external_engine_answers_as_the_policy_does(project, keys):
    near = ran(project, "near", stage(project, rollout={"engine": "native", "correction": 2.0}, **keys))
    said = [(line["sample"], line["completion"]) for line in rollouts(project)]
    far = ran(project, "far", stage(project, **keys))
    assert [(line["sample"], line["completion"]) for line in rollouts(project)] == said
    for one, other in zip(near, far, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert max(line["engine_gap_worst"] for line in far) < 1e-4
    assert not rooms(os.getpid())


@pytest.mark.capability("Reinforcement learning of a model that workers hold together")
@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("grpo", {"updates": 2}),
        ("ppo", {"adapter": {"rank": 4}}),
        ("grpo", {"kl": 0.1, "rollout": {"ahead": 1}}),
    ],
)
@pytest.mark.long
def test_a_policy_that_ranks_hold_together_learns_as_one(project, tmp_path, recipe, keys):
    project.stages["tune"] = stage(project, recipe=recipe, parallel={"shard": True}, **keys)
    tree = load(Path(project.write()).read_text(), "small.yaml").tree

    def worked(run: str, ranks: int, parallel: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
        run_ranks("meshes:work_on_stage", meshes.StageOnMesh(tree, str(tmp_path / run), parallel), ranks)
        stage = Run(str(tmp_path / run)).stage("tune")
        said = [(line["issue"], line["sample"], line["completion"]) for line in stage.rollouts.read()]
        return stage.metrics.read(), sorted(said)

    alone, said = worked("alone", 1, {})
    for run, ranks, parallel in (("sharded", 2, {}), ("divided", 2, {"tensor": 2})):
        together, answered = worked(run, ranks, parallel)
        assert answered == said
        assert [one["loss"] for one in together] == pytest.approx([one["loss"] for one in alone], rel=1e-3, abs=1e-5)
        assert max(one["engine_gap_worst"] for one in together if "engine_gap_worst" in one) < 1e-4


@pytest.mark.capability("Rounds answered while the one before is trained, with a bound on staleness")
@pytest.mark.parametrize("ahead", [1, 3])
def test_no_token_is_older_than_the_rounds_ahead(project, ahead):
    told = ran(project, "ahead", stage(project, steps=8, rollout={"ahead": ahead}))
    assert [line["step"] for line in told] == list(range(1, 9))
    ages = [
        line["step"] - 1 - version
        for line in rollouts(project)
        if line.get("outcome") == "trained"
        for version in line["versions"]
    ]
    assert max(ages) == min(ahead, 7)
    assert min(ages) >= 0
    assert all(outcome.total() == 1 for outcome in outcomes(rollouts(project)).values())


def test_one_round_ahead_repeats_bitwise(project):
    one = ran(project, "one", stage(project, steps=6, rollout={"ahead": 1}))
    assert ran(project, "two", stage(project, steps=6, rollout={"ahead": 1})) == one


@pytest.mark.capability("A dead engine is replaced and what it was answering is asked again")
@pytest.mark.parametrize("ahead", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_engine_shows_in_nothing_but_an_event(project, monkeypatch, ahead):
    calm = ran(project, "calm", stage(project, steps=6, rollout={"ahead": ahead}))
    generate, calls = ExternalEngine.generate, []

    def hit(self, requests, *more):
        calls.append(len(requests))
        if len(calls) in (2, 4):
            [server] = servers()
            server.kill()
        return generate(self, requests, *more)

    monkeypatch.setattr(ExternalEngine, "generate", hit)
    assert ran(project, "hit", stage(project, steps=6, rollout={"ahead": ahead})) == calm
    assert [event["engine"] for event in project.directory.events.read() if event["kind"] == "engine_died"] == [
        "native",
        "native",
    ]
    assert not servers()


def servers() -> list[psutil.Process]:
    """The engines below this process."""
    return [one for one in psutil.Process().children(recursive=True) if serves(one)]


def serves(process: psutil.Process) -> bool:
    try:
        found = process.cmdline()
        return "postlude.rollout.serving.native_server" in found[1:4] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_weights_that_shared_memory_has_no_room_for_go_elsewhere():
    choice = lookup("engines", "native")()
    assert choice.weights_folder(1) == SHARED_MEMORY
    assert choice.weights_folder(2**60) == Path(tempfile.gettempdir())


@pytest.mark.capability("A killed trainer leaves no engine and no file of one")
def test_a_killed_trainer_leaves_no_engine(project):
    project.stages["rl"] = stage(project, steps=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "postlude", "run", project.write(), "--inline"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not (engines := [one for one in below(process) if serves(one)]) or not rooms(process.pid):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(engines, timeout=300)
    while rooms(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in engines)


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.long
@pytest.mark.capability("A whole stage of reinforcement learning on vLLM")
def test_a_stage_on_vllm_learns_as_one_on_the_native_engine(project, tmp_path, vllm):
    model = {"path": write_random_model(tmp_path / "wide", 1, hidden_size=64, num_attention_heads=2)}
    rewards = {}
    for engine, ahead, options in (("native", 0, {}), ("vllm", 1, {"options": vllm.options})):
        rollout = {"prompts": 8, "engine": {"name": engine, **options}, "ahead": ahead}
        told = ran(project, engine, stage(project, model=model, steps=25, rollout=rollout))
        rewards[engine] = [line["reward"] for line in told]
        assert told[-1]["reward"] > told[0]["reward"] + 0.3
        assert all(line.get("engine_gap_worst", 0.0) < 1e-4 for line in told)
        assert max(line["staleness"] for line in told) <= ahead
    assert rewards["vllm"][-1] > rewards["native"][-1] - 0.2


@pytest.mark.parametrize(
    ("rollout", "more", "said"),
    [
        ({"ahead": 1, "engine": "native"}, {}, "apart: true"),
        ({"engine": "vllm", "top_p": 0.9}, {}, "top_p"),
        ({"engine": "vllm"}, {"adapter": {"rank": 2, "base": "int8"}}, "adapter"),
        ({"engine": {"name": "vllm", "addresses": ["localhost"]}}, {}, "http://host:port"),
        ({"engine": {"name": "vllm", "sleeps": True}, "ahead": 1}, {}, "sleeps"),
        ({"engine": {"name": "vllm", "network": True}}, {}, "addresses"),
        ({"engine": "vlm"}, {}, "vllm"),
        ({"engine": "native", "pool": "engines"}, {}, "apart: true"),
        ({"engine": {"name": "vllm", "addresses": ["http://one:1"]}, "pool": "engines"}, {}, "without addresses"),
        ({"pool": "train"}, {}, "name another one"),
        ({"pool": "engines"}, {}, "Leave --inline out"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(project, rollout, more, said):
    project.stages["rl"] = stage(project, rollout=rollout, **more)
    with pytest.raises(ManifestError, match=said):
        project.run()


def test_engines_whose_number_may_change_are_refused_before_any_work(project):
    project.manifest["compute"] = {"pools": {"engines": {"workers": {"min": 1, "max": 2}}}}
    project.stages["rl"] = stage(project, rollout={"pool": "engines"})
    assert project.validate().exit_code == 4
    assert "Give it a fixed one" in str(project.validate().error)


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"python": "/nowhere"}, "make vllm"), ({"addresses": ["http://127.0.0.1:9"]}, "no vLLM server")],
)
def test_an_engine_that_is_not_there_ends_the_stage_at_its_start(project, keys, said):
    project.stages["rl"] = stage(project, rollout={"engine": {"name": "vllm", **keys}})
    with pytest.raises(ComputeError, match=said):
        project.run()
    assert not rollouts(project)


@pytest.fixture
def many_ends(monkeypatch) -> None:
    """One token in sixteen ends a completion, so that the lengths have a long tail."""
    monkeypatch.setattr("postlude.stages.online.stop_ids_of", lambda config, encoder: frozenset(range(96, 112)))


@pytest.mark.capability("Over-sampling: a round does not wait for its longest answers, which go on in the next")
@pytest.mark.parametrize("engine", ["native", APART])
def test_what_is_cut_goes_on_in_the_next_round(project, engine, many_ends):
    rollout = {"prompts": 4, "max_tokens": 60, "engine": engine, "oversample": 2.0}
    told = ran(project, "cut", stage(project, steps=8, group=2, rollout=rollout))
    assert [line["step"] for line in told] == list(range(1, 9))
    samples = [line for line in rollouts(project) if line.get("outcome") == "trained"]
    spans = [line for line in samples if line["versions"][0] != line["versions"][1]]
    assert spans
    assert all(0 <= line["step"] - 1 - line["versions"][0] <= 1 for line in samples)
    assert all(outcome.total() == 1 for outcome in outcomes(rollouts(project)).values())
    assert sum(line["outcome"] == "dropped" for line in rollouts(project)) <= 16


def test_a_stage_that_keeps_what_was_cut_goes_on_bitwise(project, monkeypatch, many_ends):
    rollout = {"prompts": 4, "max_tokens": 60, "engine": "native", "oversample": 2.0}
    keys = {"steps": 6, "group": 2, "updates": 2, "checkpoint": {"every": 1}, "rollout": rollout}
    calm = ran(project, "calm", stage(project, **keys))
    said = rollouts(project)
    project.stages["rl"] = stage(project, **keys)
    project.manifest |= {"name": "shaken", "run_dir": str(project.folder / "shaken")}
    run_cut_off(project, monkeypatch, [2, 4, 5])
    assert lines(project) == calm
    assert rollouts(project) == said
