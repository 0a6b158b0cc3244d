"""Online reinforcement learning through the whole of a run: what is told, what is left out, and what comes again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest

from postlude.data import room
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.runs.tokens import Tokens
from postlude.training.trainer import Trainer
from stages.conftest import outcomes

TIMED = ("seconds", "busy", "tokens_per_second", "memory_bytes", "mfu")


def online(project, recipe: str = "grpo", **keys: Any) -> dict[str, Any]:
    """A stage that answers and learns."""
    base = {
        "recipe": recipe,
        "model": {"path": project.models["one"]},
        "data": {"asked": 1.0},
        "steps": 4,
        "threads": 1,
        "batch": {"tokens": 4096, "block": 128},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "schedule": "constant",
        "rollout": {"prompts": 4, "max_tokens": 6},
        "group": 4,
        "reward": [{"function": {"name": "regex", "pattern": "[a-m]"}}],
    }
    return {**base, **keys}


def lines(project, stage: str = "rl") -> list[dict[str, Any]]:
    """The metrics, without what differs from run to run."""
    told = project.directory.stage(stage).metrics.read()
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in told]


def rollouts(project, stage: str = "rl") -> list[dict[str, Any]]:
    return project.directory.stage(stage).rollouts.read()


def run_cut_off(project, monkeypatch, steps: list[int]) -> None:
    """Run to the end, begun again each time that it is cut off: when it is to train these steps."""
    train, left = Trainer.train, list(steps)

    def stopping(self, work):
        if left and self.step == left[0]:
            left.pop(0)
            raise RuntimeError("cut off")
        train(self, work)

    monkeypatch.setattr(Trainer, "train", stopping)
    while left:
        with pytest.raises(RuntimeError, match="cut off"):
            project.run()
    assert project.run() == 0


@pytest.mark.capability("Online reinforcement learning: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++, PPO")
@pytest.mark.parametrize("recipe", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"])
def test_every_algorithm_makes_its_steps(project, recipe):
    keys = {"updates": 2, "passes": 2} if recipe == "ppo" else {}
    project.stages["rl"] = online(project, recipe, **keys)
    assert project.run() == 0
    told = lines(project)
    assert [line["step"] for line in told] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 and 0 <= line["reward"] <= 1 for line in told)
    assert all(line["behaviour_gap"] < 1e-4 for line in told[:1])
    samples = [line for line in rollouts(project) if line.get("outcome") == "trained"]
    assert {line["sample"] for line in samples} == set(range(4))
    assert all(outcome.total() == 1 for outcome in outcomes(rollouts(project)).values())
    assert project.directory.stage("rl").has_artifact()


def test_a_critic_may_stand_on_the_policy(project):
    project.stages["rl"] = online(project, "ppo", critic={"trunk": "policy"}, kl=0.0)
    assert project.run() == 0
    assert all("value_loss" in line and "grad_norm_critic" not in line for line in lines(project))


@pytest.mark.capability("On-policy distillation")
def test_a_student_comes_nearer_to_its_teacher_on_its_own_answers(project):
    keys = {"teacher": {"path": project.models["two"]}, "steps": 30, "group": 1}
    stage = {**online(project, "on_policy_distill", **keys), "rollout": {"prompts": 16, "max_tokens": 6}}
    project.stages["rl"] = {key: value for key, value in stage.items() if key != "reward"}
    assert project.run() == 0
    told = lines(project)
    assert told[-1]["divergence"] < 0.5 * told[0]["divergence"]


@pytest.mark.capability("Online reinforcement learning raises the reward")
def test_what_is_rewarded_becomes_likely(project):
    keys = {"steps": 25, "rollout": {"prompts": 8, "max_tokens": 6}, "evaluate": {"data": {"asked": 1.0}, "limit": 5}}
    project.stages["rl"] = online(project, **keys)
    assert project.run() == 0
    told = lines(project)
    assert told[-1]["reward"] > told[0]["reward"] + 0.3
    events = [e for e in project.directory.events.read() if e["kind"] == "evaluation"]
    assert events[-1]["metrics"]["reward"] >= events[0]["metrics"]["reward"]


@pytest.mark.capability("Exact resume of online reinforcement learning, within a round too")
@pytest.mark.parametrize("every", [1, 3])
def test_a_stage_that_stopped_goes_on_bitwise(project, monkeypatch, every):
    """Two updates of two passes: four steps a round, so that most checkpoints fall into one."""
    stage = online(project, "ppo", steps=9, updates=2, passes=2, group=2, kl_target=0.1, checkpoint={"every": every})
    project.stages["rl"] = {**stage, "evaluate": {"data": {"asked": 1.0}, "every": 4, "limit": 3}}
    project.manifest |= {"name": "calm", "run_dir": str(project.folder / "calm")}
    assert project.run() == 0
    calm, said = lines(project), rollouts(project)
    project.manifest |= {"name": "shaken", "run_dir": str(project.folder / "shaken")}
    run_cut_off(project, monkeypatch, [2, 4, 7])
    assert lines(project) == calm
    assert rollouts(project) == said
    assert all(outcome.total() == 1 for outcome in outcomes(said).values())
    assert sorted(outcomes(said)) == list(range(int(calm[-1]["prompts_issued"])))  # nine steps end within a round


def test_a_correction_of_an_engine_that_is_the_policy_is_one(project):
    project.stages["plain"] = online(project)
    project.stages["corrected"] = online(project, rollout={"prompts": 4, "max_tokens": 6, "correction": 2.0})
    assert project.run() == 0
    plain, corrected = lines(project, "plain"), lines(project, "corrected")
    for without, with_it in zip(plain, corrected, strict=True):
        assert with_it["correction"] == pytest.approx(1, abs=1e-5)
        assert with_it["reward"] == without["reward"]
        assert with_it["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-3)


@pytest.mark.capability("Tokens of some rollouts are kept with what engine and trainer say, and change no bit")
def test_tokens_are_kept_and_nothing_follows_from_it(project):
    for name, every in (("kept", 1), ("none", 0)):
        rollout = {"prompts": 4, "max_tokens": 6, "record_tokens": every}
        project.stages[name] = online(project, steps=2, rollout=rollout)
    assert project.run() == 0
    weights = {name: (project.artifact(name) / "model.safetensors").read_bytes() for name in project.stages}
    told = {name: (lines(project, name), rollouts(project, name), weights[name]) for name in project.stages}
    names = ("token_texts", "token_runs", "token_versions", "engine_logp", "trainer_logp", "entropy")
    samples = [line for line in told["kept"][1] if "token_texts" in line]
    bare = [{key: value for key, value in line.items() if key not in names} for line in told["kept"][1]]
    assert (told["kept"][0], bare, told["kept"][2]) == told["none"]
    assert len(samples) == sum(line.get("outcome") == "trained" for line in bare) > 0
    entropies = []
    for line in samples:
        kept = Tokens.of(line)
        assert kept.sampled.sum() == line["tokens"]
        assert line["prompt"][0]["content"] in "".join(kept.texts)
        assert set(kept.versions[kept.sampled].tolist()) == set(line["versions"])
        # The engine is the policy, before its step.
        assert np.abs(kept.ratio[kept.sampled] - 1).max() < 1e-4
        entropies += kept.entropy[kept.sampled].tolist() if line["step"] == 1 else []
    assert np.mean(entropies) == pytest.approx(told["kept"][0][0]["entropy"], rel=1e-4)


def test_prompts_of_which_none_can_be_asked_end_the_run(project):
    long = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}
    project.data["asked"] = project.written("asked", [long] * 3)
    project.stages["rl"] = online(project)
    with pytest.raises(DataError, match=r"nothing to train on.*because the prompt is longer than 122 tokens"):
        project.run()


def test_prompts_that_cannot_be_asked_are_dropped_and_told(project):
    long = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}
    nothing = {"messages": [{"role": "system", "content": "only this"}]}
    short = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "y"}]} for n in range(6)
    ]
    project.data["asked"] = project.written("asked", [long, nothing, *short])
    project.stages["rl"] = {**online(project, steps=None, epochs=2)}
    assert project.run() == 0
    dropped = Counter(line["reason"] for line in rollouts(project) if line.get("outcome") == "dropped")
    assert dropped == {
        "the prompt is longer than 122 tokens": 2,
        "the prompt ends with a message of the role 'system'": 2,
    }
    found = outcomes(rollouts(project))
    assert sorted(found) == list(range(16))
    assert all(one.total() == 1 for one in found.values())
    assert lines(project)[-1]["prompts_trained"] == 12
    assert project.validate().exit_code == 0


def test_dynamic_sampling_replaces_what_teaches_nothing(project):
    project.stages["rl"] = online(project, "dapo", reward=[{"function": {"name": "regex", "pattern": "[a-m]"}}])
    assert project.run() == 0
    told = lines(project)
    assert all(line["groups_alike"] == 0 and line["documents"] == 16 for line in told)
    dropped = [line for line in rollouts(project) if line.get("outcome") == "dropped"]
    assert dropped
    assert {line["reason"] for line in dropped} == {"all samples have the same reward"}
    assert told[-1]["prompts_dropped"] == len({line["issue"] for line in dropped})


REWARDS = """
import os, time

def flaky(prompt, completion, record):
    number = sum(map(ord, completion)) % 5
    if number == 0:
        raise RuntimeError("no idea")
    if number == 1:
        return float("nan")
    if number == 2:
        os._exit(3)
    return 1.0

def hangs(prompt, completion, record):
    if sum(map(ord, completion)) % 3 == 0:
        while True:
            time.sleep(1)
    return 1.0

def raises(prompt, completion, record):
    raise RuntimeError("never any idea")
"""


@pytest.fixture
def unreliable_rewards(tmp_path, monkeypatch):
    (tmp_path / "unreliable_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.capability("A reward that fails, hangs or is no number leaves its sample out, and is counted")
@pytest.mark.parametrize("function", ["flaky", "hangs"])
def test_a_reward_that_fails_is_never_zero(project, unreliable_rewards, function):
    keys = {"rollout": {"prompts": 4, "max_tokens": 6, "reward_seconds": 2}}
    project.stages["rl"] = online(project, "grpo", reward=[{"function": f"unreliable_rewards:{function}"}], **keys)
    project.stages["rl"]["steps"] = 2
    assert project.run() == 0
    told = rollouts(project)
    unscored = [line["unscored"] for line in told if "unscored" in line]
    assert unscored
    assert all("reward" not in line for line in told if "unscored" in line)
    assert all(line["reward"] == 1.0 for line in lines(project))
    assert {line["reward"] for line in told if "reward" in line} == {1.0}
    kinds = {"flaky": ("no idea", "no finite number", "ended its process"), "hangs": ("longer than 2 seconds",)}
    assert any(kind in reason for kind in kinds[function] for reason in unscored)


def test_a_reward_that_never_works_ends_the_run_with_its_reason(project, unreliable_rewards):
    project.stages["rl"] = online(project, reward=[{"function": "unreliable_rewards:raises"}])
    with pytest.raises(DataError, match=r"Not one of 16 samples has a reward.*never any idea.*unreliable_rewards.py"):
        project.run()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"group": 1}, "a group of one has nothing to compare with"),
        ({"reward": []}, "'reward' is needed"),
        ({"rollout": {"max_tokens": 128}}, "leaves no room for a prompt"),
        ({"reference": {"path": "x"}}, "'reference' is read with"),
        ({"parallel": {"shard": True}}, "apart: true"),
        ({"evaluate": {"data": {"asked": 1.0}, "samples": 2}}, "are all the same"),
    ],
)
def test_keys_that_cannot_be_are_refused(project, keys, told):
    project.stages["rl"] = online(project, **keys)
    with pytest.raises(ManifestError, match=told):
        project.run()


def test_a_preflight_answers_and_learns_a_little(project):
    project.stages["judge"] = {**project.train(recipe="reward"), "data": {"pairs": 1.0}}
    pair = {"prompt": "a?", "chosen": "b", "rejected": "c"}
    project.data["pairs"] = project.written("pairs", [pair] * 4, "preference")
    project.stages["rl"] = online(project, "ppo", reward=[{"model": {"from": "judge"}}])
    report = project.validate()
    assert report.exit_code == 0, report.error
    assert report.stages[-1].trial.counts["prompts"] == 20
    assert report.stages[-1].rehearsal.grad_norm > 0


# --- environments --------------------------------------------------------------------------------------------

GAMES = """
from postlude.manifest.component import register
from postlude.rollout.environment import Environment, Reply

@register("environments", "hearing")
class Hearing(Environment):
    broken: bool = False

    async def reset(self, prompt, record):
        return Game(self.broken and int(record["number"]) % 2)

class Game:
    def __init__(self, broken):
        self.broken, self.turns = broken, 0

    async def step(self, said):
        if self.broken:
            raise RuntimeError("nobody hears")
        self.turns += 1
        heard = sum(letter in "ab" for letter in said)
        return Reply([{"role": "user", "content": f"{heard}, again"}], done=self.turns == 3, reward=heard / 4)
"""


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """A module that registers an environment; it stays, as a plugin does."""
    folder = tmp_path_factory.mktemp("games")
    (folder / "hearing_games.py").write_text(GAMES)
    sys.path.append(str(folder))
    yield "hearing_games"
    sys.path.remove(str(folder))


@pytest.fixture
def hearing(project, games):
    """A project whose policy says a letter or two in each of three turns, and is heard where it is a or b."""
    project.manifest["plugins"] = [games]
    said = ["a", "b", "c", "ca", "dd"]
    records = [
        {
            "number": n,
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": said[n % 5]},
                {"role": "user", "content": "1, again"},
                {"role": "assistant", "content": said[n % 3]},
            ],
        }
        for n in range(20)
    ]
    project.data["asked"] = project.written("asked", records)
    asked = [{**record, "messages": record["messages"][:1]} for record in records]
    project.data["games"] = project.written("games", asked)
    project.stages["sft"] = project.train(data={"asked": 1.0}, steps=60, optimizer={"lr": 3e-2})
    return project


def play(hearing, **keys: Any) -> list[dict[str, Any]]:
    """The samples of a stage that plays."""
    rollout = {"prompts": 4, "max_tokens": 12}
    environment = {"name": "hearing", **keys}
    stage = {"model": {"from": "sft"}, "data": {"games": 1.0}, "reward": [], "environment": environment}
    hearing.stages["rl"] = online(hearing, rollout=rollout, batch={"tokens": 4096, "block": 256}, **stage)
    assert hearing.run() == 0
    return rollouts(hearing)


@pytest.mark.capability("Online reinforcement learning over several turns: environments, tools")
def test_an_environment_answers_between_turns_and_rewards_them(hearing):
    told = play(hearing)
    trained = [one for one in told if one["outcome"] == "trained"]
    whole = [one for one in trained if len(one.get("turns", [])) == 3]
    assert len(whole) > len(trained) / 3
    for one in trained:
        turns, replies = one.get("turns", [one["completion"]]), one.get("replies", [])
        assert len(turns) == len(replies) + 1
        heard = [sum(letter in "ab" for letter in turn) for turn in turns]
        assert [reply[0]["content"] for reply in replies] == [f"{number}, again" for number in heard[:-1]]
        # A turn without an end is the last, and nobody hears it.
        assert one["reward"] == sum(heard if one["ended"] == "stop" else heard[:-1]) / 4
        assert one["rewards"] == {"hearing": one["reward"]}
        assert one["tokens"] <= 12
    line = lines(hearing)[0]
    assert line["grad_norm"] > 0
    assert line["behaviour_gap"] < 1e-4  # the trainer sees what was given where the engine saw it
    again = hearing.folder / "again"
    hearing.manifest["run_dir"] = str(again)
    assert hearing.run() == 0
    assert rollouts(hearing) == told
    assert hearing.validate().stages[-1].trial.counts["prompts"] == 20


def test_where_an_environment_fails_its_samples_are_left_out_and_told(hearing):
    told = play(hearing, broken=True)
    left = [one for one in told if "unscored" in one]
    assert left
    assert all("the environment 'hearing' failed" in one["unscored"].lower() for one in left)
    assert all("RuntimeError: nobody hears" in one["unscored"] for one in left)
    assert any(one["outcome"] == "trained" and one["reward"] > 0 for one in told)


# --- real input -----------------------------------------------------------------------------------------------

NOUNS = ("cat", "dog", "boy", "girl", "bird", "tree", "fish", "bear", "frog", "king", "cow", "mouse", "duck", "fox")


@pytest.mark.long
@pytest.mark.capability("Online reinforcement learning raises a real model's held-out reward, whatever the seed")
@pytest.mark.parametrize(("recipe", "seed"), [("grpo", 1), ("grpo", 2), ("grpo", 3), ("ppo", 4)])
def test_a_model_of_stories_learns_to_tell_happy_ones(project, shared_data, recipe, seed):
    begun = [
        {"text": f"Once upon a time there was a {size} {noun}."} for noun in NOUNS for size in ("little", "big", "red")
    ]
    project.data["asked"] = project.written("openings", begun[:30], "text")
    project.data["unseen"] = project.written("unseen", begun[30:], "text")
    project.manifest["seed"] = seed
    project.stages["rl"] = online(
        project,
        recipe,
        model={"path": str(shared_data / "models" / "stories260K_hf")},
        steps=16 if recipe == "grpo" else 40,  # PPO makes four of a round
        optimizer={"name": "adamw", "lr": 1e-3},
        rollout={"prompts": 8, "max_tokens": 20},
        group=8,
        reward=[{"function": {"name": "contains", "texts": ["happy"]}}],
        evaluate={"data": {"unseen": 1.0}, "samples": 8, "temperature": 1.0},
    )
    assert project.run() == 0
    events: list[dict[str, Any]] = [e["metrics"] for e in project.directory.events.read() if e["kind"] == "evaluation"]
    assert events[-1]["reward"] > events[0]["reward"] + 0.2
    assert events[-1]["pass_at_8"] >= events[-1]["pass_at_1"]


# --- chaos --------------------------------------------------------------------------------------------------


def start(project, name: str) -> subprocess.Popen:
    project.manifest |= {"name": name, "run_dir": str(project.folder / name)}
    command = [sys.executable, "-m", "postlude", "run", project.write()]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def of_kind(kind: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a run's processes that do one of its works."""
    marks = {"rank": "ray::Worker", "reward": "spawn_main", "engine": "postlude.rollout.serving.native_server"}
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if marks[kind] in " ".join(_command(process)) and process.name() != room.NAME:
                found.append(process)
    return found


@pytest.mark.long
@pytest.mark.capability("Chaos: reinforcement learning killed at random ends bitwise as if undisturbed")
def test_a_killed_loop_is_bitwise_the_undisturbed_one(project):
    """Killed are a rank, an engine, a process that computes rewards, and the controller with all its processes."""
    stage = online(project, "grpo", steps=None, epochs=6, updates=2, group=4, kl=0.01, checkpoint={"every": 3})
    project.stages["rl"] = {
        **stage,
        "rollout": {"prompts": 5, "max_tokens": 60, "engine": {"name": "native", "apart": True}},
        "batch": {"tokens": 16384, "block": 256},
    }
    project.manifest["compute"] = {
        "pools": {"train": {"workers": 2}},
        "supervision": {"failures": 20, "silence_seconds": 60},
    }
    process = start(project, "calm")
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    calm, said = lines(project), rollouts(project)
    rng, hits = random.Random(2), Counter()
    left = ["rank", "engine", "reward", "controller"]
    while True:
        process = start(project, "shaken")
        while process.poll() is None and left:
            at = project.directory.stage("rl").metrics
            known = at.read()[-1]["step"] if at.size_bytes() else 0
            aim = min(known + rng.randrange(2, 7), 44)
            while process.poll() is None and (at.read()[-1]["step"] if at.size_bytes() else 0) < aim:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.1)
            if process.poll() is not None:
                break
            victim = left[0]
            if victim == "controller":
                os.killpg(process.pid, signal.SIGKILL)
            elif victims := of_kind(victim, psutil.Process(process.pid).children(recursive=True)):
                rng.choice(victims).kill()
            else:
                continue  # it is being started
            hits[left.pop(0)] += 1
        output, _ = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output.decode()
    assert set(hits) == {"rank", "engine", "reward", "controller"}
    assert lines(project) == calm
    assert rollouts(project) == said
    found = outcomes(said)
    assert sorted(found) == list(range(120))
    assert all(one.total() == 1 for one in found.values())


def _command(process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
