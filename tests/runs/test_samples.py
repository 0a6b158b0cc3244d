"""The index of rollouts tells of each group what its lines say, and finds them again."""

from __future__ import annotations

import math
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude import storage
from postlude.runs.samples import Rollouts
from postlude.runs.schemas import RolloutLine
from postlude.storage import reader

a_line = st.fixed_dictionaries(
    {"step": st.integers(1, 6), "issue": st.integers(0, 3)},
    optional={
        "prompt_id": st.sampled_from(["a:1", "a:2"]),
        "sample": st.integers(0, 3),
        "reward": st.sampled_from([0.0, 0.5, 1.0]),
        "advantage": st.sampled_from([-1.0, 0.0, 2.0]),
        "tokens": st.integers(0, 9),
        "versions": st.sampled_from([[0, 1], [2, 2], [-1, -1]]),
        "completion": st.sampled_from(["", "é\n<b>", "x" * 90]),
        "outcome": st.sampled_from(["trained", "dropped"]),
        "reason": st.sampled_from(["too long", "all alike"]),
    },
)


def groups_of(lines: list[dict]) -> list[list[dict]]:
    """In the order of their first lines."""
    groups: dict[Any, list[dict]] = {}
    for number, line in enumerate(lines):
        key = (line["issue"], line["prompt_id"]) if "prompt_id" in line else number
        groups.setdefault(key, []).append(line)
    return list(groups.values())


def check(index: Rollouts, lines: list[dict]) -> None:
    expected = groups_of(lines)
    count, told = index.groups(count=1000)
    assert count == len(told) == len(expected)
    assert len(index) == len(lines)
    assert [group.step for group in told] == sorted((group.step for group in told), reverse=True)
    for group in told:
        own = expected[group.number]
        assert index.samples(group.number) == own
        rewards = [line["reward"] for line in own if "reward" in line]
        assert group.reward == (pytest.approx(sum(rewards) / len(rewards)) if rewards else None)
        assert (group.least, group.most) == (min(rewards, default=None), max(rewards, default=None))
        assert group.is_alike == (len(rewards) > 1 and len(set(rewards)) == 1)
        assert group.samples == sum("prompt_id" in line for line in own)
        assert group.prompt_id == own[0].get("prompt_id")
        assert group.issue == own[0]["issue"]
        tokens = [line["tokens"] for line in own if "tokens" in line]
        assert group.tokens == (sum(tokens) if tokens else None)
        stale = [line["step"] - 1 - line["versions"][0] for line in own if line.get("versions", [-1])[0] >= 0]
        assert group.staleness == max(stale, default=None)
        outcomes = [line["outcome"] for line in own if "outcome" in line]
        assert group.outcome == ("trained" if "trained" in outcomes else outcomes[0] if outcomes else None)
        advantages = [line["advantage"] for line in own if "advantage" in line]
        assert (group.advantage is None) == (not advantages)
        assert group.advantage is None or abs(group.advantage) == max(map(abs, advantages))
    for prompt_id in ("a:1", "a:2", "a:9"):
        _, own_groups = index.groups(prompt_id=prompt_id, descending=False)
        assert len(own_groups) == sum(group[0].get("prompt_id") == prompt_id for group in expected)
    dropped, _ = index.groups(outcome="dropped")
    assert dropped == sum(count for (outcome, _), count in index.became().items() if outcome == "dropped")
    assert sum(index.became().values()) == len(expected)


@settings(deadline=None, max_examples=60)
@given(lives=st.lists(st.lists(a_line, max_size=15), max_size=3), cut=st.integers(0, 20))
def test_groups_are_what_the_lines_say(lives: list, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BLOCK_BYTES", 300)
        patch.setattr(reader, "MARK_BYTES", 200)
        journal = storage.Journal(f"/dev/shm/rollouts-{os.getpid()}.jsonl", RolloutLine)
        storage.remove(journal.uri)
        index = Rollouts(journal)
        for life in lives:
            for line in life:
                journal.append(line)
            index.update()
            check(index, journal.read())
            left = iter(range(cut))
            journal.cut(lambda line, left=left: next(left, None) is not None)
        index.update()
        check(index, journal.read())
        storage.remove(journal.uri)


@pytest.fixture
def journal(place: str) -> storage.Journal:
    return storage.Journal(f"{place}/{uuid.uuid4().hex}/part-00000000.jsonl", RolloutLine)


def group(step: int, issue: int, *rewards: float | None, **more: Any) -> list[dict]:
    rewarded = [{} if reward is None else {"reward": reward} for reward in rewards]
    return [
        {"step": step, "issue": issue, "prompt_id": f"a:{issue}", "sample": sample, **reward, **more}
        for sample, reward in enumerate(rewarded)
    ]


def test_pages_are_sorted_and_filtered(journal: storage.Journal) -> None:
    lines = [*group(1, 0, 0.0, 1.0, outcome="trained"), *group(1, 1, 1.0, 1.0, outcome="dropped", reason="alike")]
    lines += [*group(2, 2, 0.25, 0.5, outcome="trained"), {"step": 2, "issue": 3, "outcome": "dropped"}]
    for line in lines:
        journal.append(line)
    journal.flush()
    index = Rollouts(journal)
    assert index.update()

    def issues(**choice: Any) -> list[int | None]:
        return [each.issue for each in index.groups(**choice)[1]]

    assert issues(sort="reward") == [1, 0, 2, 3]  # what was never answered has no reward: last, both ways
    assert issues(sort="reward", descending=False) == [2, 0, 1, 3]
    assert issues(sort="spread") == [0, 2, 1, 3]
    assert issues(alike=True) == [1]
    assert issues(reason="alike") == [1]
    assert issues(reason="never") == []
    assert issues(outcome="trained", sort="step") == [2, 0]
    assert index.groups(sort="reward", first=1, count=2)[0] == 4
    assert issues(sort="reward", first=1, count=2) == [0, 2]
    assert index.became() == {("trained", None): 2, ("dropped", "alike"): 1, ("dropped", None): 1}


def test_a_damaged_line_is_told_and_the_rest_shown(tmp_path: Path) -> None:
    path = tmp_path / "part-00000000.jsonl"
    path.write_text('{"step": 1, "issue": 0}\n{"step": \n{"step": 2, "issue": 1, "reward": "NaN"}\n')
    index = Rollouts(storage.Journal(str(path), RolloutLine))
    assert index.update()
    assert [each.issue for each in index.groups(descending=False)[1]] == [0, 1]
    assert index.samples(1)[0]["step"] == 2
    assert math.isnan(index.samples(1)[0]["reward"])
    assert len(index.damages) == 1
    assert "line 2" in index.damages[0]


def test_lines_that_were_written_anew_are_not_taken_for_others(tmp_path: Path) -> None:
    journal = storage.Journal(str(tmp_path / "part-00000000.jsonl"), RolloutLine)
    for line in group(1, 0, 1.0):
        journal.append(line)
    index = Rollouts(journal)
    index.update()
    journal.cut(lambda line: False)
    for line in group(1, 7, 1.0):
        journal.append(line)
    with pytest.raises(storage.CorruptError, match="anew"):
        index.samples(0)
    index.update()
    assert index.samples(0)[0]["issue"] == 7


def test_lines_that_stand_side_by_side_are_one_request(
    journal: storage.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [*group(1, 0, 1.0, 0.0), *group(1, 1, 1.0), *group(1, 0, 0.5, 0.25, 0.0)]
    for line in lines:
        journal.append(line)
    index = Rollouts(journal)
    index.update()
    asked: list[int] = []
    read_range = storage.read_range

    def counted(place: str, start: int, count: int) -> bytes:
        asked.append(count)
        return read_range(place, start, count)

    monkeypatch.setattr(storage, "read_range", counted)
    assert [line["reward"] for line in index.samples(0)] == [1.0, 0.0, 0.5, 0.25, 0.0]
    assert len(asked) == 2
