"""The recipe ``generate``: what is kept, what the records say, and that formats read them."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from postlude.data.example import Conversation, Text
from postlude.data.formats.messages import Messages
from postlude.data.formats.prompt_completion import PromptCompletion
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError

DIGITS = {"function": "stages.scores:digits"}


def by_prompt(records):
    found = defaultdict(list)
    for record in records:
        found[record["prompt_id"]].append(record)
    return found


@pytest.mark.capability("Generation as a stage: responses, best of n, rejection sampling, preference pairs")
def test_all_completions_are_kept_and_read_by_two_formats(project):
    project.stages["answers"] = project.generate(samples=3, concurrency=16)
    assert project.run() == 0
    records = project.records("answers")
    assert len(records) == 60
    assert len({record["id"] for record in records}) == 60
    asked = {record["prompt"][0]["content"] for record in records}
    assert asked == {f"{n}+{n}?" for n in range(20)}
    for record in records:
        completion = record["completion"][0]["content"]
        (whole,) = Messages().parse(record)
        (split,) = PromptCompletion().parse(record)
        assert isinstance(whole, Conversation)
        assert [message["content"] for message in whole.messages] == [record["prompt"][0]["content"], completion]
        assert [message["content"] for message in split.messages] == [m["content"] for m in whole.messages]
        assert record["reference"] == str(2 * int(record["prompt"][0]["content"].partition("+")[0]))
        assert record["completion_tokens"] <= 6
        assert record["ended"] in ("stop", "length")
        assert "reward" not in record
    lines = project.directory.stage("answers").metrics.read()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) == 4
    assert sum(line["completions"] for line in lines) == 60
    assert project.report("answers")["tokens"] == sum(record["completion_tokens"] for record in records)


def test_the_lineage_tells_model_and_data(project):
    project.stages["answers"] = project.generate(reward=[{"model": {"path": project.models["judge"]}}])
    assert project.run() == 0
    lineage = json.loads((project.artifact("answers") / "lineage.json").read_text())
    assert lineage["models"] == {
        "model": {"path": project.models["one"]},
        "rewards": [{"path": project.models["judge"]}],
    }
    assert set(lineage["data"]) == {"asked"}
    assert lineage["recipe"] == "generate"


def test_best_top_and_above_keep_what_they_say(project):
    ways = {"all": "all", "best": "best", "two": {"top": 2}, "over": {"above": 3.5}}
    for name, keep in ways.items():
        project.stages[name] = project.generate(samples=4, reward=[DIGITS], keep=keep)
    assert project.run() == 0
    every = by_prompt(project.records("all"))
    assert len({record["reward"] for group in every.values() for record in group}) > 2
    for name, kept in (("best", 1), ("two", 2)):
        for prompt, records in by_prompt(project.records(name)).items():
            highest = sorted((record["reward"] for record in every[prompt]), reverse=True)[:kept]
            assert [record["reward"] for record in records] == highest
    over = {record["id"] for record in project.records("over")}
    assert over == {record["id"] for group in every.values() for record in group if record["reward"] > 3.5}
    left = project.report("over")["nothing_of"]["no completion has a reward above the threshold"]
    assert left["count"] == sum(all(record["reward"] <= 3.5 for record in group) for group in every.values())


def test_pairs_are_the_best_and_the_worst(project):
    project.stages["all"] = project.generate(samples=3, reward=[DIGITS])
    project.stages["pairs"] = project.generate(samples=3, reward=[DIGITS], keep="pairs")
    assert project.run() == 0
    every = by_prompt(project.records("all"))
    pairs = project.records("pairs")
    report = project.report("pairs")
    assert len(pairs) + report["nothing_of"]["all completions have the same reward"]["count"] == 20
    assert len(pairs) > 5
    for pair in pairs:
        rewards = sorted(record["reward"] for record in every[pair["prompt_id"]])
        said = {record["completion"][0]["content"]: record["reward"] for record in every[pair["prompt_id"]]}
        assert said[pair["chosen"][0]["content"]] == rewards[-1]
        assert said[pair["rejected"][0]["content"]] == rewards[0]
        assert pair["margin"] == rewards[-1] - rewards[0] > 0
        assert [message["role"] for message in pair["prompt"]] == ["user"]
        assert pair["chosen"][0]["role"] == "assistant"


def test_texts_are_continued_and_stay_texts(project):
    records = [{"prompt": f"{n} and ", "completion": f"{n + 1}", "extra": n} for n in range(6)]
    project.data["asked"] = project.written("texts", records, "prompt_completion")
    project.stages["answers"] = project.generate(temperature=0.0)
    assert project.run() == 0
    made = project.records("answers")
    assert [record["prompt"] for record in made] == [record["prompt"] for record in records]
    assert [record["reference"] for record in made] == [record["completion"] for record in records]
    assert [record["extra"] for record in made] == list(range(6))
    (example,) = PromptCompletion().parse(made[0])
    assert isinstance(example, Text)
    assert "messages" not in made[0]


def test_a_reward_model_scores_the_whole_conversation(project):
    judge = {"model": {"path": project.models["judge"]}, "weight": 0.5, "label": "judge"}
    project.stages["answers"] = project.generate(samples=2, reward=[judge, DIGITS])
    assert project.run() == 0
    for record in project.records("answers"):
        assert set(record["rewards"]) == {"judge", "digits"}
        expected = 0.5 * record["rewards"]["judge"] + record["rewards"]["digits"]
        assert record["reward"] == pytest.approx(expected, abs=1e-12)
    assert len({record["rewards"]["judge"] for record in project.records("answers")}) > 20


@pytest.mark.long
def test_several_workers_make_the_same_records(project):
    project.stages["answers"] = project.generate(samples=2, concurrency=8, reward=[DIGITS])
    assert project.run() == 0
    alone = (project.artifact("answers") / "data.jsonl").read_bytes()
    project.manifest |= {"name": "two", "compute": {"pools": {"train": {"workers": 2}}}}
    assert project.run() == 0
    assert (project.artifact("answers") / "data.jsonl").read_bytes() == alone


def test_a_text_that_looks_like_a_number_stays_a_text(project, monkeypatch):
    """What a model says is written down as it is, also where it is "NaN"."""
    monkeypatch.setattr("postlude.rollout.prompts.PromptEncoder.text", lambda self, tokens: "NaN")
    project.stages["answers"] = project.generate()
    assert project.run() == 0
    assert {record["completion"][0]["content"] for record in project.records("answers")} == {"NaN"}


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"keep": "pairs", "reward": [DIGITS]}, "samples"),
        ({"keep": "best"}, "'reward' is needed"),
        ({"reward": [{"function": "numbr"}]}, "Did you mean 'number'"),
        ({"reward": [{"function": "number", "model": {"from": "x"}}]}, "exactly one of 'function' and 'model'"),
        ({"reward": [{"function": {"name": "number", "tolerence": 1}}]}, "tolerance"),
        ({"keep": {"abov": 1.0}, "reward": [DIGITS]}, "above"),
        ({"data": {"asked": 0.5}}, "greater than or equal to 1"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(project, keys, said):
    project.stages["answers"] = project.generate(**keys)
    report = project.validate()
    assert isinstance(report.error, ManifestError)
    assert said in str(report.error)


@pytest.mark.capability("Bad input gets a clear error and loses nothing")
@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        ("stages.scores:digit", ManifestError, "Did you mean 'digits'"),
        ("stages.scored:digits", ManifestError, "cannot be imported"),
        ("stages.scores:broken", DataError, "Not one of 20 samples has a reward.*KeyError: 'all'"),
        ("stages.scores:nothing", DataError, "returned None for the record 'asked:"),
    ],
)
def test_a_reward_function_that_fails(project, function, error, said):
    project.stages["answers"] = project.generate(reward=[{"function": function}])
    with pytest.raises(error, match=said):
        project.run()
    assert not project.directory.stage("answers").has_artifact()


@pytest.mark.capability("Deadlines for rewards, templates and expressions that are not ours")
@pytest.mark.parametrize(
    ("function", "reason"),
    [("stages.scores:broken_at_seven", "failed"), ("stages.scores:stays_at_seven", "longer than 2 seconds")],
)
def test_a_reward_that_fails_at_one_record_leaves_it_out(project, function, reason):
    project.stages["answers"] = project.generate(reward=[{"function": function}], reward_seconds=2)
    assert project.run() == 0
    assert len(project.records("answers")) == 19
    [(said, counted)] = project.report("answers")["nothing_of"].items()
    assert reason in said
    assert counted["count"] == 1
    assert "asked:" in counted["examples"][0]


def test_data_without_a_prompt(project):
    records = [{"messages": [{"role": "assistant", "content": "Hello"}]}]
    asked = project.written("asked", records, {"name": "messages", "roles": "any"})
    project.data["asked"] = asked
    project.stages["answers"] = project.generate()
    said = r"'answers' hold no prompt that can be asked: 1 because nothing comes before the assistant's turn"
    assert isinstance(project.validate().error, DataError)
    with pytest.raises(DataError, match=said):
        project.run()


def test_a_prompt_that_is_too_long_is_counted(project, models):
    records = [chat_of(3), chat_of(3000), chat_of(5)]
    project.data["asked"] = {**project.written("asked", records), "key": "id"}
    project.stages["answers"] = project.generate()
    assert project.run() == 0
    assert project.report("answers")["nothing_of"] == {
        "the prompt is longer than 2047 tokens": {"count": 1, "examples": ["asked:3000"]}
    }
    assert len(project.records("answers")) == 2


def chat_of(length):
    asked = {"role": "user", "content": "a" * length}
    return {"id": length, "messages": [asked, {"role": "assistant", "content": "b"}]}


def test_a_stage_that_keeps_nothing_says_why(project):
    project.stages["answers"] = project.generate(reward=[DIGITS], keep={"above": 100.0})
    with pytest.raises(DataError, match=r"'answers' made no record of 20 prompts: 20 because no completion"):
        project.run()


def test_a_stage_that_makes_data_is_no_model(project):
    project.stages["answers"] = project.generate()
    project.stages["sft"] = project.train(model={"from": "answers"}, data={"asked": 1.0})
    assert "'answers' makes no model to start from" in str(project.validate().error)
