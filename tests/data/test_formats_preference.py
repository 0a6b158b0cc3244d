"""The formats of preferences: pairs, ranked lists and judged answers; what is trained of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from postlude.data.example import BadRecord, Conversation, Format, Judged, Ranked, Text, scores_of
from postlude.data.formats.judged import JudgedAnswer
from postlude.data.formats.preference import Preference, ShareGPTPreference
from postlude.data.formats.prompt_completion import PromptCompletion
from postlude.data.formats.ranked import RankedAnswers

ASKED = [{"role": "user", "content": "What is the capital of France?"}]


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asked(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def refusal(format: Format, record: Any) -> str:
    with pytest.raises(BadRecord) as refused:
        format.parse(record)
    return str(refused.value)


def trained(answer: Any) -> list[str]:
    """What is trained of an answer: texts."""
    if isinstance(answer, Text):
        return [text for text, weight in answer.pieces if weight]
    return [m["content"] for m in answer.messages if m["role"] == "assistant" and m.get("weight", 1.0)]


def ranked(format: Format, record: Any) -> Ranked:
    (example,) = format.parse(record)
    assert isinstance(example, Ranked)
    return example


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.capability("Preference pairs, ranked lists and judged answers as data")
def test_a_pair_of_texts() -> None:
    pair = ranked(Preference(separator="\n"), {"prompt": "Q", "chosen": "yes", "rejected": "no", "margin": 2})
    assert pair == Ranked([Text([("Q\n", 0.0), (text, 1.0)]) for text in ("yes", "no")], (2.0, 0.0))
    assert ranked(Preference(), {"prompt": "Q", "chosen": "yes", "rejected": "no"}).scores is None


def test_a_pair_of_messages_trains_the_answers_alone() -> None:
    before = [*ASKED, said("Rome."), asked("Really?")]
    record = {"q": before, "good": [said("Paris.")], "bad": [said("Rome!"), asked("Sure?"), said("Yes.")]}
    pair = ranked(Preference(prompt="q", chosen="good", rejected="bad"), record)
    assert [trained(answer) for answer in pair.answers] == [["Paris."], ["Rome!", "Yes."]]
    assert all([m["content"] for m in a.messages[:3]] == [m["content"] for m in before] for a in pair.answers)  # type: ignore[union-attr]


def test_without_a_prompt_it_is_what_both_sides_share() -> None:
    before = [{"role": "system", "content": "Be brief."}, *ASKED, said("Hm."), asked("And?")]
    record = {"chosen": [*before, said("Paris.")], "rejected": [*before, said("Rome.")]}
    pair = ranked(Preference(), record)
    assert [trained(answer) for answer in pair.answers] == [["Paris."], ["Rome."]]
    texts = {"chosen": "Human: Hi!\n\nAssistant: Hello you.", "rejected": "Human: Hi!\n\nAssistant: Help."}
    pair = ranked(Preference(), texts)
    assert [trained(answer) for answer in pair.answers] == [["Hello you."], ["Help."]]
    assert pair.answers[0] == Text([("Human: Hi!\n\nAssistant: ", 0.0), ("Hello you.", 1.0)])


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_the_beginning_of_texts_is_shared_and_nothing_is_lost(start: str, first: str, second: str) -> None:
    record = {"chosen": start + first, "rejected": start + second}
    try:
        pair = ranked(Preference(), record)
    except BadRecord:
        return
    given = {answer.pieces[0][0] for answer in pair.answers}  # type: ignore[union-attr]
    assert len(given) == 1
    whole = ["".join(text for text, _ in answer.pieces) for answer in pair.answers]  # type: ignore[union-attr]
    assert whole == [record["chosen"], record["rejected"]]
    assert all(trained(answer)[0].strip() for answer in pair.answers)


def test_tools_go_along() -> None:
    tools = [{"name": "find", "parameters": {}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": "{}"}]}
    pair = ranked(Preference(), {"prompt": ASKED, "chosen": [call], "rejected": [said("No.")], "tools": tools})
    assert isinstance(pair.answers[0], Conversation)
    assert pair.answers[0].tools
    assert pair.answers[0].messages[-1]["tool_calls"]


PAIR = {"prompt": ASKED, "chosen": [said("Paris.")], "rejected": [said("Rome.")]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rejected": [said("Paris.")]}, "its 'chosen' and its 'rejected' are equal"),
        ({"rejected": []}, "its 'rejected' has no message"),
        ({"rejected": [said("  ")]}, "its 'rejected' is empty: the assistant says nothing"),
        ({"chosen": [asked("Why?")]}, "out of order"),
        ({"chosen": None}, "its 'chosen' is null"),
        ({"chosen": "Paris."}, "its 'chosen' is text, but its prompt is a list"),
        ({"prompt": 3}, "its prompt is a number, neither text nor a list of messages"),
        ({"prompt": "Q", "chosen": "yes"}, "its 'rejected' is a list, but its prompt is text"),
        ({"prompt": "Q", "chosen": "yes", "rejected": ""}, "its 'rejected' is empty"),
        ({"prompt": "Q", "chosen": "yes", "rejected": "yes"}, "are equal"),
        ({"prompt": None, "chosen": "yes", "rejected": "yes"}, "are equal"),
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, "they answer different prompts"),
        ({"prompt": None, "chosen": [*ASKED, said("a")], "rejected": [asked("b"), said("a")]}, "different prompts"),
        ({"prompt": None, "chosen": [*ASKED, said("a")], "rejected": [*ASKED, said("a")]}, "are equal"),
        ({"prompt": None, "chosen": [*ASKED, said("a")], "rejected": ASKED}, "no turn of the assistant"),
        ({"margin": "much"}, "its 'margin' is text, not a number"),
        ({"margin": float("nan")}, "its 'margin' is nan, not a finite number"),
        ({"margin": True}, "its 'margin' is true or false, not a number"),
    ],
)
def test_pairs_that_are_refused(change: dict[str, Any], expected: str) -> None:
    assert expected in refusal(Preference(), {**PAIR, **change})


def test_the_sharegpt_layout(shared_data: Path) -> None:
    records = json.loads((shared_data / "dpo_demo" / "dpo_en_demo.json").read_text())
    read = 0
    for record in records:
        pair = ranked(ShareGPTPreference(), record)
        assert [trained(answer) for answer in pair.answers] == [[record[s]["value"]] for s in ("chosen", "rejected")]
        read += 1
    assert read == 300
    bad = {**records[0], "rejected": records[0]["chosen"]}
    assert "are equal" in refusal(ShareGPTPreference(), bad)
    assert "its 'rejected' is empty" in refusal(ShareGPTPreference(), {**bad, "rejected": {"from": "gpt", "value": ""}})
    assert "no column 'rejected'" in refusal(ShareGPTPreference(), {k: v for k, v in bad.items() if k != "rejected"})
    assert "no turn" in refusal(ShareGPTPreference(), {**records[0], "conversations": []})


# --- a prompt that its answers hold again -------------------------------------------------------------------

ASSISTED = {"role": "system", "content": "Be brief."}


@pytest.mark.capability("Preferences whose sides hold their prompt again")
@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        (ASKED, ASKED),
        (ASKED[0]["content"], ASKED),  # a text beside messages, as UltraFeedback has them
        (f" {ASKED[0]['content']}\n", [ASSISTED, *ASKED]),
        (ASKED, [ASSISTED, *ASKED]),
        ([ASSISTED, *ASKED], [ASSISTED, *ASKED]),
        (ASKED[0]["content"], [asked("Hi!"), said("Hello!"), *ASKED]),
        ([asked("Hi!"), said("Hello!"), *ASKED], [asked("Hi!"), said("Hello!"), *ASKED]),
    ],
)
@pytest.mark.parametrize("roles", ["strict", "any"])
def test_messages_that_repeat_their_prompt_say_it_once(prompt: Any, before: list[Any], roles: Any) -> None:
    answers = [[said("Paris.")], [said("Rome."), asked("Sure?"), said("Yes.")]]
    alone = ranked(Preference(roles=roles), {"chosen": [*before, *answers[0]], "rejected": [*before, *answers[1]]})
    record = {"prompt": prompt, "chosen": [*before, *answers[0]], "rejected": [*before, *answers[1]]}
    assert ranked(Preference(roles=roles), record) == alone
    assert ranked(Preference(roles=roles, repeats_prompt=True), record) == alone
    listed = {"prompt": prompt, "answers": [record["chosen"], record["rejected"]]}
    assert ranked(RankedAnswers(roles=roles), listed) == alone
    (judged,) = JudgedAnswer(roles=roles).parse({"prompt": prompt, "completion": record["chosen"], "label": True})
    assert isinstance(judged, Judged)
    assert judged.answer == alone.answers[0]
    [completed] = PromptCompletion(roles=roles).parse({"prompt": prompt, "completion": record["chosen"]})
    assert completed == alone.answers[0]


def test_a_text_is_what_the_user_says_before_answers_that_are_messages() -> None:
    record = {"chosen": [said("Paris.")], "rejected": [said("Rome.")]}
    assert ranked(Preference(), {"prompt": ASKED[0]["content"], **record}) == ranked(
        Preference(), {"prompt": ASKED, **record}
    )


def test_texts_that_begin_with_their_prompt_are_read_as_the_manifest_says() -> None:
    record = {"prompt": "Say hello.", "chosen": "Say hello. Hello!", "rejected": "Say hello. No."}
    assert "set the format's 'repeats_prompt: true'" in refusal(Preference(), record)
    pair = ranked(Preference(repeats_prompt=True, separator="\n"), record)
    assert pair == Ranked([Text([("Say hello.", 0.0), (text, 1.0)]) for text in (" Hello!", " No.")])
    assert trained(ranked(Preference(repeats_prompt=False), record).answers[0]) == ["Say hello. Hello!"]
    short = {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi"}
    assert [trained(answer) for answer in ranked(Preference(), short).answers] == [["Hi there!"], ["Hi"]]
    one = {**record, "rejected": "No."}
    assert trained(ranked(Preference(), one).answers[0]) == ["Say hello. Hello!"]
    assert "its 'rejected' does not begin with its prompt" in refusal(Preference(repeats_prompt=True), one)


@pytest.mark.parametrize("roles", ["strict", "any"])
def test_a_side_that_repeats_the_prompt_by_itself_is_refused(roles: Any) -> None:
    record = {"prompt": ASKED, "chosen": [*ASKED, said("Paris.")], "rejected": [said("Rome.")]}
    assert "its 'chosen' says its prompt again, but not all" in refusal(Preference(roles=roles), record)


def test_no_advice_where_following_it_would_say_the_prompt_twice() -> None:
    before = [asked("what is the capital of france")]  # the same prompt in other words
    record = {"prompt": ASKED, "chosen": [*before, said("Paris.")], "rejected": [*before, said("Rome.")]}
    told = refusal(Preference(), record)
    assert "does not repeat this prompt word by word" in told
    assert "roles: any" not in told
    pair = ranked(Preference(prompt="no such column"), record)
    assert [trained(answer) for answer in pair.answers] == [["Paris."], ["Rome."]]


# --- lists and labels ---------------------------------------------------------------------------------------


def test_a_ranked_list_by_order_scores_or_ranks() -> None:
    record = {"prompt": "Q", "answers": ["b", "a", "c"], "s": [1, 5.5, -1], "r": [2, 1, 3]}

    def order(format: Format) -> list[str]:
        return [text for answer in ranked(format, record).answers for text in trained(answer)]

    assert order(RankedAnswers()) == ["b", "a", "c"]
    assert order(RankedAnswers(scores="s")) == ["a", "b", "c"]
    assert scores_of(ranked(RankedAnswers(scores="s"), record)) == [5.5, 1.0, -1.0]
    assert order(RankedAnswers(ranks="r")) == ["a", "b", "c"]
    assert ranked(RankedAnswers(ranks="r"), record).scores is None
    whole = {"answers": [[*ASKED, said(text)] for text in ("Paris", "Lyon", "Rome")]}
    assert [trained(a) for a in ranked(RankedAnswers(), whole).answers] == [["Paris"], ["Lyon"], ["Rome"]]
    with pytest.raises(ValidationError, match="not both"):
        RankedAnswers(scores="s", ranks="r")


@pytest.mark.parametrize(
    ("keys", "change", "expected"),
    [
        ({}, {"answers": ["a"]}, "has 1 entries: to rank takes two answers"),
        ({}, {"answers": ["a", "b", "a"]}, "answer 1 and answer 3 are equal"),
        ({}, {"answers": ["a", " "]}, "answer 2 is empty"),
        ({"scores": "s"}, {"s": [1]}, "its 's' has 1 entries for 2 answers"),
        ({"scores": "s"}, {"s": [1, 1]}, "are all 1, so no answer is better"),
        ({"scores": "s"}, {"s": [1, None]}, "for answer 2 is null, not a number"),
        ({"ranks": "s"}, {"s": [1, 1]}, "two of its answers have the same rank"),
    ],
)
def test_lists_that_are_refused(keys: dict[str, str], change: dict[str, Any], expected: str) -> None:
    assert expected in refusal(RankedAnswers(**keys), {"prompt": "Q", "answers": ["a", "b"], **change})


def test_judged_answers(shared_data: Path) -> None:
    records = json.loads((shared_data / "dpo_demo" / "kto_en_demo.json").read_text())
    for record in records:
        (example,) = JudgedAnswer().parse(record)
        assert isinstance(example, Judged)
        assert example.desirable is record["label"]
        assert trained(example.answer) == [record["messages"][-1]["content"]]
    (example,) = JudgedAnswer().parse({"prompt": "Q", "completion": "A", "label": 0})
    assert example == Judged(Text([("Q", 0.0), ("A", 1.0)]), False)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [*ASKED, said("Paris.")]}, "no column 'label'"),
        ({"messages": [*ASKED, said("Paris.")], "label": "good"}, "its 'label' is 'good'; it should be true or false"),
        ({"messages": [*ASKED, said("Paris.")], "label": 2}, "its 'label' is 2"),
        ({"messages": ASKED, "label": True}, "the last of its 'messages' is not the assistant's"),
        ({"messages": [*ASKED, said("")], "label": True}, "is empty: the assistant says nothing"),
        ({"prompt": "Q", "completion": "", "label": True}, "its 'completion' is empty"),
        ({"label": True}, "no column 'messages'"),
    ],
)
def test_judgements_that_are_refused(record: dict[str, Any], expected: str) -> None:
    assert expected in refusal(JudgedAnswer(), record)


@pytest.mark.parametrize("repeats", [False, True])
def test_messages_in_the_texts_of_a_table_are_messages(repeats: bool) -> None:
    start = ASKED if repeats else []
    record: dict[str, Any] = {
        "prompt": ASKED,
        "chosen": [*start, said("Paris")],
        "rejected": [*start, said("Rome")],
        "completion": [said("Paris")],
        "answers": [[said("Paris")], [said("Rome")]],
        "label": True,
    }
    texts = {name: json.dumps(value) if isinstance(value, list) else value for name, value in record.items()}
    in_texts = {**texts, "answers": [json.dumps(answer) for answer in record["answers"]]}
    for format in (Preference(), PromptCompletion(), RankedAnswers(), JudgedAnswer()):
        assert format.parse(texts) == format.parse(in_texts) == format.parse(record)
    kept = ranked(Preference(), {"prompt": "Q", "chosen": '[{"a": 1}]', "rejected": "[1"})
    assert kept.answers[0] == Text([("Q", 0.0), ('[{"a": 1}]', 1.0)])


def test_numbers_that_single_precision_does_not_hold_are_refused() -> None:
    record = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    for margin in (10**400, -1e39, float("inf")):
        assert "not a finite number" in refusal(Preference(), {**record, "margin": margin})
    assert ranked(Preference(), {**record, "margin": 2**70}).scores == (float(2**70), 0.0)
