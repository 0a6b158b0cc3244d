"""What does not end at one record, in each of the stages that use it: the record is named, and the stage ends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from postlude.data import masks, room
from postlude.data.filters import predicate
from postlude.errors import DataError
from stages.conftest import chat, unending_template
from stages.test_online import online

UNENDING = pytest.mark.capability("Deadlines for rewards, templates and expressions that are not ours")
TOOK = "took longer than 0.5 seconds"


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(room, "SECONDS", 0.5)


@pytest.fixture
def asked(project):
    """Twelve questions, of which the eighth is ``7+7?``."""
    records = [{"n": n, **chat(f"{n}+{n}?", str(2 * n))} for n in range(12)]
    project.data["asked"] = {**project.written("asked", records), "key": "n"}
    return project


@pytest.mark.long
@UNENDING
def test_a_template_that_does_not_end_at_one_record(asked):
    pairs = [
        {"n": n, "prompt": chat(f"{n}+{n}?", "")["messages"][:1], "chosen": said("yes"), "rejected": said("no")}
        for n in range(12)
    ]
    asked.data["pairs"] = {**asked.written("pairs", pairs, "preference"), "key": "n"}
    for data in asked.data.values():
        data |= {"template": unending_template("7+7?"), "on_bad_record": "skip"}
    model, once = {"path": asked.models["one"]}, {"epochs": 1, "steps": None}
    generation = {"data": {"asked": 1.0}, "max_tokens": 4, "reward": [{"function": "stages.scores:digits"}]}
    held_out = {"held_out": {"data": {"asked": 1.0}}, "generation": generation}
    asked.stages |= {
        "sft": asked.train(data={"asked": 1.0}, **once),
        "dpo": asked.train(recipe="dpo", data={"pairs": 1.0}, **once),
        "answers": asked.generate(),
        "report": {"recipe": "evaluate", "models": {"one": model}, "threads": 1, **held_out},
        "rl": online(asked, steps=1, rollout={"prompts": 12, "max_tokens": 4}),
    }
    report = asked.validate()
    assert report.error is None, report.error
    stages = {stage["stage"]: stage for stage in report.to_json()["stages"]}
    for name, data in (("sft", "asked"), ("dpo", "pairs")):
        [left] = stages[name]["data"]["sources"][data]["dropped"].values()
        assert left["examples"] == [f"{data}:7"]
    for name in ("answers", "rl"):
        [left] = stages[name]["trial"]["counts"]["nothing_of"].values()
        assert left["examples"] == ["asked:7"]
    assert asked.run() == 0
    assert [record["n"] for record in asked.records("answers")] == [n for n in range(12) if n != 7]
    left = asked.report("report")["left_out"]
    assert {place: counted["examples"] for place, reasons in left.items() for counted in reasons.values()} == {
        "one/held_out/asked": ["asked:7"],
        "one/generation/asked": ["asked:7"],
    }
    assert [line["dropped"] for line in asked.directory.stage("rl").rollouts.read() if "dropped" in line] == []


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def stay_at_seven(function: Any) -> Any:
    """A function of one argument, that does not end where that has ``7+7?`` in it."""

    def stays(*arguments: Any) -> Any:
        while "7+7?" in str(arguments[-1]):
            pass
        return function(*arguments)

    return stays


@UNENDING
@pytest.mark.parametrize("on_bad_record", ["skip", "stop"])
def test_an_expression_of_spans_that_does_not_end_at_one_record(asked, monkeypatch, on_bad_record):
    monkeypatch.setattr(masks, "_matches", stay_at_seven(masks._matches))
    asked.data["asked"] |= {"train_on": {"spans": r"\d+", "turns": "all"}, "on_bad_record": on_bad_record}
    asked.stages["sft"] = asked.train(data={"asked": 1.0}, epochs=1, steps=None)
    if on_bad_record == "stop":
        error = asked.validate().error
        assert "'asked:7' cannot be used" in str(error)
        assert TOOK in str(error)
        with pytest.raises(DataError, match=TOOK):
            asked.run()
        return
    assert asked.run() == 0


@UNENDING
@pytest.mark.parametrize("on_bad_record", ["skip", "stop"])
def test_a_predicate_that_does_not_end_at_one_record(asked, monkeypatch, on_bad_record):
    def rows_of(task: Any) -> Any:
        while "7+7?" in str(task[2].to_pylist()):
            pass
        return ours(task)

    ours = predicate._rows_of
    monkeypatch.setattr(predicate, "_rows_of", rows_of)
    asked.data["asked"] |= {"filters": ["n < 10 AND len(messages) = 2"], "on_bad_record": on_bad_record}
    asked.stages["kept"] = {"recipe": "filter", "data": {"asked": 1.0}, "threads": 1}
    if on_bad_record == "stop":
        error = asked.validate().error
        assert "line 8" in str(error)
        assert TOOK in str(error)
        return
    assert asked.run() == 0
    assert [record["n"] for record in asked.records("kept")] == [n for n in range(10) if n != 7]
    assert asked.report("kept")["dropped_by_filters"]["asked"]["bad record"] == 1


MATHEMATICS = """
def parse(text, **_):
    while text == "14":
        pass
    return [text]

def verify(right, answer, **_):
    return right == answer
"""


@UNENDING
def test_a_mathematics_check_and_a_reward_that_do_not_end_at_one_record(asked, monkeypatch, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "math_verify.py").write_text(MATHEMATICS)
    monkeypatch.syspath_prepend(str(tmp_path / "ours"))
    rewards = [{"function": "mathematics"}, {"function": "stages.scores:stays_at_eight"}]
    generation = {"data": {"asked": 1.0}, "max_tokens": 4, "reward": rewards, "reward_seconds": 1}
    model = {"path": asked.models["one"]}
    asked.stages["report"] = {"recipe": "evaluate", "models": {"one": model}, "threads": 1, "generation": generation}
    assert asked.validate().error is None
    assert asked.run() == 0
    [reasons] = asked.report("report")["left_out"].values()
    assert sorted(left["examples"][0].partition("#")[0] for left in reasons.values()) == ["asked:7", "asked:8"]
    assert all("longer than 1 seconds" in reason for reason in reasons)
    details = [json.loads(line) for line in (asked.artifact("report") / "details.jsonl").open()]
    assert len([one for one in details if "rewards" in one]) == 10
