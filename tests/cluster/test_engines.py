"""Engines in a pool of their own: they outlive those who train, and what is killed shows in nothing but an event."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from postlude.cluster.engines import EngineHost
from postlude.cluster.worker import WorkerSetup
from postlude.rollout.engine import Request, Sampling
from postlude.rollout.engines.native import Native
from postlude.rollout.serving.server import EngineDied, Serving
from stages.conftest import outcomes, write_random_model
from stages.test_engines import rooms

pytestmark = pytest.mark.long

EXACT = ("step", "loss", "grad_norm", "reward", "completion_tokens", "engine_gap", "tokens", "prompts_issued")


@pytest.fixture(scope="module")
def calm(tmp_path_factory, new_project) -> list[dict[str, Any]]:
    """The metrics of an undisturbed run."""
    project = asking(new_project(tmp_path_factory.mktemp("calm")))
    project.start()
    project.ended()
    return told(project)


def asking(project):
    """A project whose stage asks two engines in a pool of their own."""
    project.stage |= {
        "recipe": "grpo",
        "steps": 40,
        "batch": {"tokens": 4096, "block": 128},
        "checkpoint": {"every": 4},
        "rollout": {"prompts": 4, "max_tokens": 8, "engine": {"name": "native", "apart": True}, "pool": "engines"},
        "group": 4,
        "reward": [{"function": {"name": "regex", "pattern": "[a-m]"}}],
    }
    project.manifest["compute"]["pools"] = {"train": {"workers": 2}, "engines": {"workers": 2}}
    return project


def told(project) -> list[dict[str, Any]]:
    """The deterministic fields of the metrics."""
    lines = project.run.stage("sft").metrics.read()
    assert [line["step"] for line in lines] == list(range(1, project.stage["steps"] + 1))
    return [{key: line[key] for key in EXACT} for line in lines]


def below(project, roots: list[int] | None, what: str) -> dict[int, psutil.Process]:
    """The processes below the controller, or below these, whose command or name has a word in it, by number."""
    found = {}
    for root in roots or [project.process.pid]:
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(root).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    words = [one.name(), *one.cmdline()[:4]]
                    if any(word.startswith(what) for word in words) and one.status() != psutil.STATUS_ZOMBIE:
                        found[one.pid] = one
    return found


@pytest.mark.capability("Engines in a pool of their own stay warm when those who train are killed")
def test_engines_stay_warm_and_whatever_is_killed_the_run_ends_as_if_undisturbed(project, calm):
    project = asking(project)
    project.start()
    project.until(lambda: project.step() > 5)
    engines = below(project, None, "postlude.rollout.serving.native_server")
    assert len(engines) == 2
    ranks, begun = project.ranks(), project.step()
    assert all(rooms(one.pid) for one in ranks)
    for one in ranks:
        one.kill()
    project.until(lambda: len(project.told("group_formed")) == 2 and project.step() > begun + 3)
    project.until(lambda: not any(rooms(one.pid) for one in ranks))
    assert below(project, None, "postlude.rollout.serving.native_server").keys() == engines.keys()
    next(iter(engines.values())).kill()
    before = project.step()
    project.until(lambda: project.step() > before + 4)
    hosts = below(project, None, "ray::EngineHost")
    assert len(hosts) == 2
    assert all(map(rooms, hosts))
    next(iter(hosts.values())).kill()
    project.until(lambda: len(below(project, None, "ray::EngineHost").keys() | hosts.keys()) == 3)
    project.ended()
    assert not any(map(rooms, hosts))
    assert told(project) == calm
    assert len(project.told("group_formed")) == 2
    assert project.told("engine_died")
    assert all(outcome.total() == 1 for outcome in outcomes_of(project).values())


def test_weights_that_are_gone_with_who_wrote_them_leave_the_engine_as_it_is(tmp_path):
    host, choice = EngineHost(WorkerSetup("host", 1, {})), Native(apart=True)
    serving = Serving(context=64, weights=10**6, concurrency=4, dtype="float32", seconds=60.0)
    asked, sampling = [Request("a", (1, 2, 3), 0)], Sampling(8, frozenset(), 1.0, seed=1)
    folder = write_random_model(tmp_path / "weights", 1)
    try:
        assert host.take(choice, serving, ("first", 0), folder, True) == 1
        said = host.generate(asked, sampling, None)
        with pytest.raises(EngineDied, match=str(tmp_path / "gone")):
            host.take(choice, serving, ("first", 1), str(tmp_path / "gone"), True)
        assert host.generate(asked, sampling, None) == said
        assert host.take(choice, serving, ("second", 0), folder, True) == 1
        assert Path(folder, "config.json").exists()
        assert not list(rooms(os.getpid())[0].rglob("*.safetensors"))
    finally:
        host.close()


def test_workers_that_make_room_for_others_leave_no_engine(project):
    """One is killed, and the controller ends the other: each has an engine beside it."""
    project = asking(project)
    del project.stage["rollout"]["pool"]
    project.manifest["compute"]["pools"] = {"train": {"workers": 2}}
    project.start()
    project.until(lambda: project.step() > 3)
    ranks, watches = project.ranks(), below(project, None, "sleep")
    assert all(rooms(one.pid) for one in ranks)
    assert len(watches) == 2
    ranks[0].kill()
    project.until(lambda: len(project.told("group_formed")) == 2)
    project.until(lambda: not any(rooms(one.pid) for one in ranks))
    project.until(lambda: not any(one.is_running() for one in watches.values()))
    project.ended()


@pytest.mark.capability("vLLM in a pool of its own, given an adapter by itself")
def test_vllm_stays_warm_when_those_who_train_are_killed(project, tmp_path, vllm):
    project = asking(project)
    wide = write_random_model(tmp_path / "wide", 1, hidden_size=64)  # on a CPU vLLM has no kernel for narrow heads
    project.stage |= {"model": {"path": wide}, "adapter": {"rank": 4}}
    del project.stage["tokenizer"]
    project.stage["rollout"]["engine"] = {"name": "vllm", "options": vllm.options}
    project.manifest["compute"]["pools"] = {"train": {"workers": 2}, "engines": {"workers": 1}}
    project.start()
    project.until(lambda: project.step() > 5)
    cores = below(project, None, "VLLM::EngineCore")
    assert len(cores) == 1
    for one in project.ranks():
        one.kill()
    project.ended()
    assert not project.told("engine_died")
    lines = project.run.stage("sft").metrics.read()
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert max(line["engine_gap_worst"] for line in lines) < 1e-3
    assert all(outcome.total() == 1 for outcome in outcomes_of(project).values())


def outcomes_of(project):
    return outcomes(project.run.stage("sft").rollouts.read())
