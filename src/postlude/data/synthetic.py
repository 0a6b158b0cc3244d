"""Synthetic records of a format: what real data may hold and test data seldom does.

A pipeline that takes these, and refuses those that are labelled bad, is proven before the real data are touched.
They are a function of the format, their number and the seed; enough of them hold every case there is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from postlude.data.example import BadRecord, Conversation, Example, Format, Record

if TYPE_CHECKING:
    from postlude.data.encode import Encoded


@dataclass(frozen=True)
class SyntheticRecord:
    """A record, and what should become of it."""

    record: Record
    good: bool
    """Whether the format should read it; else it should say what is wrong with it."""
    what: str
    """What is odd about it."""


def synthetic_records(format: Format, n: int, seed: int = 0) -> list[SyntheticRecord]:
    """``n`` records of the format, good ones and bad ones.

    ManifestError if the format is another package's and does not say what a record looks like.
    """
    chance = random.Random(f"synthetic records {seed}")
    records: list[SyntheticRecord] = []
    while len(records) < n:
        cycle = [record for case in _cases(chance) if (record := _record_of(format, case)) is not None]
        cycle += _misshapen(format, chance)
        chance.shuffle(cycle)
        records += cycle
    return records[:n]


@dataclass(frozen=True)
class Verdict:
    """What became of the records of one kind."""

    what: str
    """What is odd about them."""
    expected: str
    """``read`` or ``refused``."""
    found: str
    """What came out, with the reason where nothing did."""
    count: int
    """How many records of the kind came out so."""
    as_expected: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_synthetic(
    format: Format, encode: Callable[[Sequence[tuple[str, Example]], str], Sequence[Encoded]], n: int, seed: int = 0
) -> list[Verdict]:
    """Send ``n`` synthetic records through the format and ``encode`` (:meth:`Encoder.encode`); the surprises first.

    What the encoder drops for a stated reason counts as read; what it cannot render or tokenise does not.
    """
    counts = Counter((case.what, case.good, *_try(case, format, encode)) for case in synthetic_records(format, n, seed))
    verdicts = [
        Verdict(what, "read" if good else "refused", outcome, count, is_read == good)
        for (what, good, is_read, outcome), count in counts.items()
    ]
    return sorted(verdicts, key=lambda verdict: (verdict.as_expected, verdict.expected != "refused", verdict.what))


def _try(case: SyntheticRecord, format: Format, encode: Callable[..., Sequence[Encoded]]) -> tuple[bool, str]:
    """Whether the record came through, and what came out."""
    try:
        examples = format.parse(case.record)
    except BadRecord as error:
        return False, f"refused: {error}"
    encoded = encode([(f"synthetic:{number}", example) for number, example in enumerate(examples)], "synthetic")
    for example in encoded:
        if example.error is not None:
            return False, f"cannot be encoded: {example.error}"
    dropped = next((example.dropped for example in encoded if example.dropped is not None), None)
    return True, "trained on" if dropped is None else f"dropped: {dropped}"


# --- as records of a format ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    what: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    fault: Literal["none", "roles", "message"] = "none"
    """Roles that only ``roles: any`` takes, or a message that is broken in itself."""


def _record_of(format: Format, case: _Case) -> SyntheticRecord | None:
    """The case as a record; None where the format cannot say it, or where what is wrong with it would be lost."""
    roles = getattr(format, "roles", None)
    if case.fault != "none" and roles is None:
        return None
    record = format.example_record(Conversation(case.messages, case.tools))
    if record is None:
        return None
    return SyntheticRecord(record, case.fault == "none" or (case.fault == "roles" and roles == "any"), case.what)


def _misshapen(format: Format, chance: random.Random) -> list[SyntheticRecord]:
    """Records whose main column is not what it should be."""
    record = format.example_record(Conversation(_talk(chance, 1)))
    assert record is not None, "every format can say a question and its answer"
    main = next(iter(record))
    rest = {name: value for name, value in record.items() if name != main}
    return [
        SyntheticRecord({}, False, "no column"),
        SyntheticRecord(rest, False, f"no column '{main}'"),
        SyntheticRecord({**rest, main: None}, False, f"'{main}' is null"),
        SyntheticRecord({**rest, main: 17}, False, f"'{main}' is a number"),
    ]


# --- what may be said ---------------------------------------------------------------------------------------

_PLAIN = ("What is the capital of France?", "Paris.", "Write a haiku about rain.", "Soft rain on the roof", "Why?")
_SCRIPTS = {
    "Arabic, right to left": "ما هي عاصمة فرنسا؟ باريس، بالطبع.",
    "Hebrew with points": "שָׁלוֹם עוֹלָם",
    "Devanagari with vowel signs": "फ़्रांस की राजधानी क्या है? पेरिस।",
    "Han without spaces": "法国的首都是哪里?巴黎,当然是巴黎。",
    "Japanese": "フランスの首都はどこですか。パリです。",
    "Korean, decomposed": "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "Thai": "เมืองหลวงของฝรั่งเศสคือปารีส",
    "Cyrillic and Greek": "Столица Франции — Париж. Η πρωτεύουσα της Γαλλίας.",
    "emoji with joiners and skin tones": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷",
    "combining marks": "e\u0301 a\u030a\u0323 Z\u0351\u036b\u0343\u0332\u0349",
    "beyond the basic plane": "𝕳𝖊𝖑𝖑𝖔 𠀀 𐍈",
    "control characters": "bell \x07, null \x00, escape \x1b[31m, form feed \x0c, no-break \u00a0, zero width \u200b",
    "marks of direction": "\u202eright to left\u202c, byte order \ufeff, replacement \ufffd",
    "line ends of every kind": "one\r\ntwo\rthree\u2028four\u0085five",
    "white space alone": " \t ",
    "white space round it": "  \n  indented\n\n\n",
    "look-alikes of special tokens": "<|im_end|>\n<|im_start|>assistant\n</s> [INST] <|eot_id|> <end_of_turn> <think>",
    "template code": "{{ messages[0].content }} {% generation %} {# not a comment #} {name}",
    "JSON": '{"role": "assistant", "content": "{\\"a\\": [1, null]}"}',
    "code": "```python\nprint(f'{1 + 1}')\n```",
}


def _turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _talk(chance: random.Random, pairs: int) -> list[dict[str, Any]]:
    return [_turn(role, chance.choice(_PLAIN)) for _ in range(pairs) for role in ("user", "assistant")]


# --- tools --------------------------------------------------------------------------------------------------

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "object"}, "days": {"type": "array", "items": {"type": "integer"}}},
            "required": ["place"],
        },
    },
}


def _calling(content: str, *arguments: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": each}} for each in arguments]
    return _turn("assistant", content, tool_calls=calls)


def _tool_cases(chance: random.Random) -> Iterator[_Case]:
    question = _turn("user", "Weather?")
    nested = {"city": 'Saint-Étienne "du Bois"', "at": [45.4, -4.4e-3, None]}
    result, answer = _turn("tool", '{"celsius": 21.5, "sky": "☀️"}'), _turn("assistant", "Sunny.")
    turns = [question, _calling("", {"place": nested, "days": [], "exact": True}), result, answer]
    yield _Case("a tool call with nested arguments", [*turns, *_talk(chance, 1)], [_WEATHER])
    calling = _calling("Let me see.", {"place": {"city": "Oslo"}}, {"place": {"city": "Rome"}})
    results, answer = [_turn("tool", "3"), _turn("tool", "19")], _turn("assistant", "Rome is warmer.")
    yield _Case("two tool calls at once", [_turn("user", "Oslo or Rome?"), calling, *results, answer], [_WEATHER])
    yield _Case("a tool call at the end", [question, _calling("", {"place": {}})], [_WEATHER])


# --- all the cases ------------------------------------------------------------------------------------------


def _cases(chance: random.Random) -> Iterator[_Case]:
    """Every case once, with texts by chance."""
    yield _Case("a question and its answer", _talk(chance, 1))
    yield _Case("several turns", _talk(chance, chance.randint(2, 5)))
    yield _Case("very many turns", _talk(chance, 60))
    yield _Case("a system message", [_turn("system", "Be brief."), *_talk(chance, 2)])
    yield _Case("an empty system message", [_turn("system", ""), *_talk(chance, 1)])
    yield _Case("a developer message", [_turn("developer", "Be brief."), *_talk(chance, 1)])
    yield _Case("an empty answer", [*_talk(chance, 1), _turn("user", "Say nothing."), _turn("assistant", "")])
    yield _Case("an empty question", [_turn("user", ""), _turn("assistant", "You said nothing.")])
    yield _Case("the same turns again", _talk(chance, 1) * 3)
    sentences = " ".join(f"{chance.choice(_PLAIN)} {chance.random()}" for _ in range(1000))
    yield _Case("a very long turn", [_turn("user", "Go on."), _turn("assistant", sentences)])
    for what, text in _SCRIPTS.items():
        yield _Case(what, [_turn("user", text), _turn("assistant", f"{text} {chance.choice(_PLAIN)}")])
    yield from _tool_cases(chance)
    yield from _bad_cases(chance)


def _bad_cases(chance: random.Random) -> Iterator[_Case]:
    hello = _turn("user", "Hello?")
    late = [_turn("system", "Now be brief."), _turn("assistant", "Yes.")]
    yield _Case("an unknown role", [_turn("narrator", "Once upon a time"), *_talk(chance, 1)], fault="roles")
    yield _Case("an assistant that begins", [_turn("assistant", "Hello!"), *_talk(chance, 1)], fault="roles")
    yield _Case("two users in a row", [hello, *_talk(chance, 1)], fault="roles")
    yield _Case("a late system message", [*_talk(chance, 1), *late], fault="roles")
    uncalled = [hello, _turn("tool", "3"), _turn("assistant", "Hello.")]
    yield _Case("a tool result without a call", uncalled, fault="roles")
    yield _Case("an empty conversation", [], fault="message")
    yield _Case("content that is a number", [_turn("user", 3), _turn("assistant", "Four.")], fault="message")
    yield _Case("content that is null", [_turn("user", None), *_talk(chance, 1)[1:]], fault="message")
    broken = [_turn("user", "Weather?"), _calling("", '{"place": ')]
    yield _Case("arguments that are not JSON", broken, [_WEATHER], "message")
