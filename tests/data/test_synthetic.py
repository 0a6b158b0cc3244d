"""Synthetic records: every format reads the good ones, refuses the bad ones, and says why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from postlude.data.example import BadRecord, Conversation, Example, Format, Record
from postlude.data.synthetic import synthetic_records, try_synthetic
from postlude.manifest.component import lookup, names
from postlude.manifest.problem import ManifestError

OURS = [name for name in names("formats") if lookup("formats", name).__module__.startswith("postlude.")]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OURS),
    ("messages", {"roles": "any", "field": "chat"}),
    ("sharegpt", {"roles": "any", "role_field": "who"}),
    ("sharegpt", {"reply_field": "chosen"}),
    ("alpaca", {"instruction_field": "q", "output_field": "a"}),
    ("prompt_completion", {"roles": "any", "separator": "\n"}),
    ("tokens", {"labels": "labels"}),
    ("tokens", {"weights": "w"}),
    ("history", {"item": "{title} ({year})", "train_last": 1}),
    ("history", {"separator": ""}),
    ("tree", {"paths": "all"}),
]


@pytest.mark.capability("Prove a pipeline on synthetic records before the data are touched")
@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_a_format_takes_the_good_and_refuses_the_bad(name: str, keys: dict[str, Any]) -> None:
    format = lookup("formats", name).model_validate(keys)
    assert isinstance(format, Format)
    cases = synthetic_records(format, 100, seed=3)
    assert len(cases) == 100
    for case in cases:
        if case.good:
            assert format.parse(case.record), case
        else:
            with pytest.raises(BadRecord):
                format.parse(case.record)
    whats = {case.what for case in cases}
    assert {"a very long turn", "Arabic, right to left", "emoji with joiners and skin tones", "no column"} <= whats
    assert any(not case.good for case in cases)


def test_what_the_chat_formats_are_given() -> None:
    cases = {case.what: case for case in synthetic_records(lookup("formats", "messages")(), 60)}  # type: ignore[arg-type]
    text = json.dumps([case.record for case in cases.values()], ensure_ascii=False)
    for expected in ("<|im_end|>", "{% generation %}", "👩‍👩‍👧‍👦", "फ़्रांस", "\\u0000", '"tool_calls"', '"arguments"'):
        assert expected in text
    assert max(len(json.dumps(case.record)) for case in cases.values()) > 30_000
    for what in (
        "an unknown role",
        "two users in a row",
        "a tool result without a call",
        "arguments that are not JSON",
    ):
        assert not cases[what].good
    loose = {
        case.what: case
        for case in synthetic_records(lookup("formats", "messages").model_validate({"roles": "any"}), 60)
    }  # type: ignore[arg-type]
    assert loose["two users in a row"].good
    assert not loose["arguments that are not JSON"].good


def test_what_becomes_of_them_is_told_by_kind() -> None:
    from postlude.data.encode import Encoded
    from postlude.errors import DataError

    def encode(examples: Sequence[tuple[str, Example]], source: str) -> list[Encoded]:
        """A template that knows no developer, and a block too short for what is very long."""
        found = []
        for _, example in examples:
            text = str(example)
            if "'developer'" in text:
                found.append(Encoded(error=DataError("The template raises: no developer.")))
            else:
                found.append(Encoded(dropped="too long" if len(text) > 20_000 else None))
        return found

    format: Any = lookup("formats", "messages")()
    verdicts = try_synthetic(format, encode, 120)
    assert sum(verdict.count for verdict in verdicts) == 120
    wrong = [verdict for verdict in verdicts if not verdict.as_expected]
    assert [(one.what, one.expected, one.found) for one in wrong] == [
        ("a developer message", "read", "cannot be encoded: The template raises: no developer.")
    ]
    assert verdicts[0] == wrong[0]
    by_what = {verdict.what: verdict for verdict in verdicts}
    assert by_what["a very long turn"].found == "dropped: too long"
    assert by_what["several turns"].found == "trained on"
    assert by_what["two users in a row"].expected == "refused"
    assert "out of order" in by_what["two users in a row"].found
    json.dumps([verdict.to_json() for verdict in verdicts])


def test_they_are_a_function_of_format_number_and_seed() -> None:
    format: Any = lookup("formats", "messages")()
    assert synthetic_records(format, 70, 1) == synthetic_records(format, 70, 1)
    assert synthetic_records(format, 70, 1)[:30] == synthetic_records(format, 30, 1)
    assert synthetic_records(format, 70, 1) != synthetic_records(format, 70, 2)
    assert synthetic_records(format, 0) == []


def test_a_format_of_another_package() -> None:
    class Lines(Format):
        def parse(self, record: Record) -> list[Example]:
            if not isinstance(record.get("lines"), list):
                raise BadRecord("no lines")
            return []

    with pytest.raises(ManifestError, match="cannot be made: it does not say what one looks like"):
        synthetic_records(Lines(), 3)

    class WrittenLines(Lines):
        def example_record(self, conversation: Conversation) -> Record | None:
            return {"lines": [message["content"] for message in conversation.messages]}

    for case in synthetic_records(WrittenLines(), 60):
        if case.good:
            WrittenLines().parse(case.record)
        else:
            with pytest.raises(BadRecord):
                WrittenLines().parse(case.record)
