"""What reward functions say, and what is said of those that are broken."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from postlude.manifest.errors import DataError, ManifestError
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import Reward, part_names
from postlude.rollout.rewards.number import number_in
from postlude.rollout.scoring import Scorer

reward = TypeAdapter(Reward).validate_python


def score(function: Any, completion: str, reference: str | None = None, **record: Any) -> float:
    prompt = Prompt("sums:1", "sums", "What is it?", None, reference, record)
    scorer = Scorer([reward({"function": function})], judge=pytest.fail)  # type: ignore[arg-type]
    return scorer.score([(prompt, completion)])[0].total


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = 8", 8),
        ("It costs $1,234.50.", 1234.5),
        ("#### 72", 72),
        ("first 9\n#### 1,000,000\n", 1e6),
        ("#### 18 apples", 18),
        (r"so \boxed{42}, which is not 43", 42),
        (r"\boxed{\frac{3}{4}}", 0.75),
        ("3/4 of it", 0.75),
        ("minus: -7", -7),
        ("−7", -7),
        ("1e-3", 0.001),
        ("from 2020 to 2024.", 2024),
        ("12%", 12),
        (".5", 0.5),
        ("x2 and v1.2.3", None),
        ("none", None),
        ("1/0", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_answers_with(text, number):
    assert number_in(text) == number


def test_only_a_marked_number_counts_where_that_is_asked():
    assert score({"name": "number", "must_mark": True}, "it is 8", "#### 8") == 0
    assert score({"name": "number", "must_mark": True}, "it is #### 8", "8") == 1


@pytest.mark.capability("Rewards: numbers, matches, expressions, functions of one's own, reward models")
def test_every_answer_of_gsm8k_is_right_by_itself_and_wrong_by_one(shared_data):
    path = next((shared_data / "gsm8k").glob("*test*.jsonl"), None) or next((shared_data / "gsm8k").glob("*.jsonl"))
    answers = [json.loads(line)["answer"] for line in path.open()]
    assert len(answers) > 1000
    for answer in answers:
        right = number_in(answer, marked=True)
        assert right is not None
        assert score("number", f"That makes {right:,.10g}.", answer) == 1
        assert score("number", f"That makes {right + 1:,.10g}.", answer) == 0


def test_tolerance_is_relative_to_the_answer():
    close = {"name": "number", "tolerance": 0.01}
    assert score(close, "1009", "1000") == 1
    assert score(close, "1011", "1000") == 0
    assert score(close, "0.1009", "0.1") == 1
    assert score(close, "0.109", "0.1") == 0
    assert score("number", "0.3333333", "1/3") == 1
    assert score("number", "1009", "1000") == 0


def test_texts():
    assert score("exact_match", " 4  apples\n", "4 apples") == 1
    assert score({"name": "exact_match", "ignore_space": False}, " 4 apples", "4 apples") == 0
    assert score({"name": "exact_match", "ignore_case": True}, "PARIS", "Paris") == 1
    assert score({"name": "exact_match", "answer": "right"}, "b", "a", right=["b", "c"]) == 1
    assert score("contains", "It is Paris.", "Paris") == 1
    assert score({"name": "contains", "texts": ["London", "Rome"]}, "It is Paris.") == 0
    assert score({"name": "regex", "pattern": r"<a>.*</a>"}, "so <a>1\n2</a>") == 1
    assert score({"name": "regex", "pattern": r"\d+", "whole": True}, "12 apples") == 0
    assert score({"name": "regex", "pattern": r"\d+", "whole": True}, " 12\n") == 1


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="no regular expression"):
        reward({"function": {"name": "regex", "pattern": "("}})


def test_parts_are_weighted_and_told_apart(monkeypatch):
    prompt = Prompt("sums:1", "sums", "?", None, "4", {})
    parts = [
        {"function": "number"},
        {"function": {"name": "regex", "pattern": "four"}, "weight": -0.5},
        {"function": {"name": "regex", "pattern": "4"}, "weight": 2.0},
        {"function": "exact_match", "label": "exact"},
    ]
    scorer = Scorer([reward(part) for part in parts], judge=pytest.fail)  # type: ignore[arg-type]
    right, words = scorer.score([(prompt, "4"), (prompt, "four, that is 4")])
    assert right.parts == {"number": 1.0, "regex": 0.0, "regex_2": 1.0, "exact": 1.0}
    assert right.total == 1 + 2 + 1
    assert words.total == 1 - 0.5 + 2


# --- functions of one's own ---------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of somebody's own."""
    (tmp_path / "own_rewards.py").write_text(
        "def polite(prompt, completion, record):\n    return 'please' in completion and record['wanted']\n"
        "def reference(prompt, completion, record):\n    return len(prompt) + len(record['reference'])\n"
        "def broken(prompt, completion, record):\n    return 1 / 0\n"
        "def silent(prompt, completion, record):\n    pass\n"
        "def text(prompt, completion, record):\n    return '1'\n"
        "def endless(prompt, completion, record):\n    return float('inf')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_a_function_gets_prompt_completion_and_record(module):
    assert score(f"{module}:polite", "please", wanted=True) == 1
    assert score(f"{module}:polite", "please", wanted=0.25) == 0.25
    assert score(f"{module}:reference", "", "four") == len("What is it?") + 4
    assert part_names([reward({"function": f"{module}:polite"})]) == ["polite"]


def test_it_is_written_back_as_it_was_given(module):
    given = {"function": f"{module}:polite", "weight": 2.0}
    assert reward(reward(given).model_dump(mode="json", by_alias=True)) == reward(given)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", r"'broken' failed at the record 'sums:1': ZeroDivisionError.*own_rewards.py:6"),
        ("silent", r"'silent' returned None for the record 'sums:1'"),
        ("text", r"'text' returned '1' for the record 'sums:1'"),
        ("endless", r"'endless' returned inf for the record 'sums:1'"),
    ],
)
def test_a_function_that_fails_names_the_record(module, name, said):
    with pytest.raises(DataError, match=said):
        score(f"{module}:{name}", "please")


def test_a_function_that_is_not_there(module):
    with pytest.raises(ManifestError, match=r"has no function 'polit'.*Did you mean 'polite'"):
        score(f"{module}:polit", "please")
    with pytest.raises(ManifestError, match=r"'no_such:thing' cannot be imported.*no_such"):
        score("no_such:thing", "please")


def test_a_record_without_an_answer_is_named():
    with pytest.raises(DataError, match=r"'sums:1': the record has no 'answer' to compare with"):
        score({"name": "number", "answer": "answer"}, "4")
    with pytest.raises(DataError, match=r"'sums:1': the answer in 'reference' has no number"):
        score("number", "4", "four")
