"""The recipe ``filter``: what the filters and a reward let through, as a data set."""

from __future__ import annotations

import pytest

from postlude.data import room
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from stages.conftest import unending_template

RIGHT = {"function": {"name": "number", "answer": "sum"}}


def records(count: int = 24):
    for n in range(count):
        messages = [{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": str(n + 1 + n % 3)}]
        yield {"messages": messages, "n": n, "sum": n + 1}


@pytest.fixture
def filtering(project):
    project.data["asked"] = {**project.written("asked", records()), "filters": ["n < 18"]}
    project.stages["kept"] = {"recipe": "filter", "data": {"asked": 1.0}, "portion": 4, "threads": 1}
    return project


@pytest.mark.capability("Filtering as a stage: by filters, by a reward, the top share")
def test_filters_alone(filtering):
    assert filtering.run() == 0
    assert filtering.records("kept") == [record for record in records() if record["n"] < 18]
    assert filtering.report("kept")["dropped_by_filters"] == {"asked": {"n < 18": 6}}


def test_above_a_reward(filtering):
    filtering.stages["kept"] |= {"reward": [RIGHT], "keep": {"above": 0.5}}
    assert filtering.run() == 0
    made = filtering.records("kept")
    assert [record["n"] for record in made] == [0, 3, 6, 9, 12, 15]
    assert all(record["reward"] == 1.0 and record["rewards"] == {"number": 1.0} for record in made)
    assert filtering.report("kept")["reward"] == pytest.approx(1 / 3)


def test_the_top_share_by_a_reward_model(filtering):
    judge = {"model": {"path": filtering.models["judge"]}}
    filtering.stages["every"] = {**filtering.stages["kept"], "reward": [judge]}
    filtering.stages["kept"] |= {"reward": [judge], "keep": {"share": 0.5}}
    assert filtering.run() == 0
    every, kept = filtering.records("every"), filtering.records("kept")
    assert len(every) == 18
    best = sorted(every, key=lambda record: -record["reward"])[:9]
    assert kept == sorted(best, key=lambda record: record["n"])


def test_the_reference_of_what_was_generated_is_compared_with(project):
    """A record of the recipe ``generate`` holds what the data answered; its last turn is what is judged."""
    project.stages["answers"] = project.generate()
    project.data["made"] = {"source": {"from": "answers"}, "format": "messages"}
    project.stages["kept"] = {"recipe": "filter", "data": {"made": 1.0}, "reward": [{"function": "contains"}]}
    assert project.run() == 0
    for record in project.records("kept"):
        assert record["reward"] == float(record["reference"] in record["completion"][0]["content"])


# --- what is wrong ------------------------------------------------------------------------------------------


def test_nothing_kept(filtering):
    filtering.stages["kept"] |= {"reward": [RIGHT], "keep": {"above": 1.0}}
    with pytest.raises(DataError, match=r"'kept' kept none of 18 records \(their mean reward is 0.3333\)"):
        filtering.run()


def test_a_conversation_without_an_answer(filtering):
    filtering.data["asked"] = filtering.written("asked", [{"messages": [{"role": "user", "content": "Hi"}]}])
    filtering.stages["kept"] |= {"reward": [{"function": "number"}]}
    with pytest.raises(DataError, match="does not end with a turn of the assistant"):
        filtering.run()


def test_keep_needs_a_reward(filtering):
    filtering.stages["kept"] |= {"keep": {"share": 0.5}}
    assert "'reward' is needed" in str(filtering.validate().error)


def test_data_sets_of_different_formats(filtering):
    texts = [{"text": "Hello"}]
    filtering.data["texts"] = filtering.written("texts", texts, "text")
    filtering.stages["kept"]["data"] = {"asked": 1.0, "texts": 1.0}
    error = filtering.validate().error
    assert isinstance(error, ManifestError)
    assert "different formats (messages, text)" in str(error)


def test_data_that_changed_since_a_stage_began_are_not_mixed(filtering, monkeypatch):
    from postlude.stages.filtering import Filtering

    do = Filtering.do

    def until(self, portion, tell):
        if portion == 2:
            raise RuntimeError("stopped here")
        return do(self, portion, tell)

    monkeypatch.setattr(Filtering, "do", until)
    with pytest.raises(RuntimeError, match="stopped here"):
        filtering.run()
    monkeypatch.setattr(Filtering, "do", do)
    filtering.written("asked", records(25))
    with pytest.raises(ManifestError, match=r"files of data\.asked changed: other content in asked\.jsonl"):
        filtering.run()


@pytest.mark.capability("Deadlines for rewards, templates and expressions that are not ours")
def test_a_reward_that_does_not_end_at_one_record_leaves_it_out(filtering):
    function = {"function": "stages.scores:stays_at_seven"}
    filtering.stages["kept"] |= {"reward": [function], "reward_seconds": 2}
    assert filtering.run() == 0
    assert [record["n"] for record in filtering.records("kept")] == [n for n in range(18) if n != 7]
    [(said, counted)] = filtering.report("kept")["nothing_of"].items()
    assert "longer than 2 seconds" in said
    assert counted["count"] == 1


@pytest.mark.capability("Deadlines for rewards, templates and expressions that are not ours")
def test_a_template_that_does_not_end_at_one_record_leaves_it_out(filtering, monkeypatch):
    monkeypatch.setattr(room, "SECONDS", 2.0)
    filtering.data["asked"] |= {"template": unending_template("7+1?"), "on_bad_record": "skip", "key": "n"}
    del filtering.stages["kept"]
    filtering.stages["answers"] = filtering.generate()
    assert filtering.run() == 0
    assert len(filtering.records("answers")) == 17
    assert filtering.report("answers")["nothing_of"] == {"cannot be rendered": {"count": 1, "examples": ["asked:7"]}}
