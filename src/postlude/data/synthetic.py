"""Synthetic records of a format: what real data may hold and test data seldom does.

A pipeline that takes these, and refuses those that are labelled bad, is proven before the real data are touched.
They are a function of the format, their number and the seed; enough of them hold every case there is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from postlude.data.example import BadRecord, Example, Format, Record
from postlude.data.formats.write import write

if TYPE_CHECKING:
    from postlude.data.encode import Encoded


@dataclass(frozen=True)
class Synthetic:
    """A record, and what should become of it."""

    record: Record
    good: bool
    """Whether the format should read it; else it should say what is wrong with it."""
    what: str
    """What is odd about it."""


def synthetic(format: Format, n: int, seed: int = 0) -> list[Synthetic]:
    """``n`` records in the shape of the format, good ones and bad ones.

    ManifestError if the format is another package's and that does not say how its records are written.
    """
    chance = random.Random(f"synthetic records {seed}")
    made: list[Synthetic] = []
    while len(made) < n:
        cases = [found for make in _CASES if (found := _shaped(format, make(chance))) is not None]
        cases += _misshapen(format, chance)
        chance.shuffle(cases)
        made += cases
    return made[:n]


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
    found: Counter[tuple[str, bool, str, bool]] = Counter()
    for case in synthetic(format, n, seed):
        is_read, outcome = _outcome(case, format, encode)
        found[case.what, case.good, outcome, is_read] += 1
    verdicts = [
        Verdict(what, "read" if good else "refused", outcome, count, is_read == good)
        for (what, good, outcome, is_read), count in found.items()
    ]
    return sorted(verdicts, key=lambda verdict: (verdict.as_expected, verdict.expected != "refused", verdict.what))


def _outcome(case: Synthetic, format: Format, encode: Callable[..., Sequence[Encoded]]) -> tuple[bool, str]:
    """Whether the record came through, and what came out."""
    try:
        examples = format.parse(case.record)
    except BadRecord as error:
        return False, f"refused: {error}"
    encoded = encode([(f"synthetic:{number}", example) for number, example in enumerate(examples)], "synthetic")
    for one in encoded:
        if one.error is not None:
            return False, f"cannot be encoded: {one.error}"
    dropped = next((one.dropped for one in encoded if one.dropped is not None), None)
    return True, "trained on" if dropped is None else f"dropped: {dropped}"


# --- in the shape of a format -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    what: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    fault: Literal["none", "roles", "message"] = "none"
    """Roles that only ``roles: any`` takes, or a message that is broken in itself."""


def _shaped(format: Format, case: _Case) -> Synthetic | None:
    """The case as a record; None where the format cannot say it, or where what is wrong with it would be lost."""
    if case.fault == "message" and not hasattr(format, "roles"):
        return None
    if case.fault == "roles" and not (hasattr(format, "roles") or format.component_name == "tree"):
        return None
    record = write(format, case.messages, case.tools)
    if record is None:
        return None
    good = case.fault == "none" or (case.fault == "roles" and getattr(format, "roles", "strict") == "any")
    return Synthetic(record, good, case.what)


def _misshapen(format: Format, chance: random.Random) -> list[Synthetic]:
    """Records whose main column is not what it should be."""
    record = write(format, _talk(chance, 1), None)
    assert record is not None, "every format can say a question and its answer"
    main = next(iter(record))
    rest = {name: value for name, value in record.items() if name != main}
    return [
        Synthetic({}, False, "no column"),
        Synthetic(rest, False, f"no column '{main}'"),
        Synthetic({**rest, main: None}, False, f"'{main}' is null"),
        Synthetic({**rest, main: 17}, False, f"'{main}' is a number"),
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


def _script(what: str, text: str) -> Callable[[random.Random], _Case]:
    return lambda chance: _Case(what, [_turn("user", text), _turn("assistant", f"{text} {chance.choice(_PLAIN)}")])


def _very_long(chance: random.Random) -> _Case:
    sentences = [f"{chance.choice(_PLAIN)} {chance.random()}" for _ in range(1000)]
    return _Case("a very long turn", [_turn("user", "Go on."), _turn("assistant", " ".join(sentences))])


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


def _call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _nested_call(chance: random.Random) -> _Case:
    call = _call(place={"city": 'Saint-Étienne "du Bois"', "at": [45.4, -4.4e-3, None]}, days=[], exact=True)
    calling = _turn("assistant", "", tool_calls=[call])
    result = _turn("tool", '{"celsius": 21.5, "sky": "☀️"}')
    messages = [_turn("user", "Weather?"), calling, result, _turn("assistant", "Sunny."), *_talk(chance, 1)]
    return _Case("a tool call with nested arguments", messages, [_WEATHER])


def _parallel_calls(chance: random.Random) -> _Case:
    calling = _turn("assistant", "Let me see.", tool_calls=[_call(place={"city": city}) for city in ("Oslo", "Rome")])
    results = [_turn("tool", "3"), _turn("tool", "19")]
    messages = [_turn("user", "Oslo or Rome?"), calling, *results, _turn("assistant", "Rome is warmer.")]
    return _Case("two tool calls at once", messages, [_WEATHER])


def _last_call(chance: random.Random) -> _Case:
    calling = _turn("assistant", "", tool_calls=[_call(place={})])
    return _Case("a tool call at the end", [_turn("user", "Weather?"), calling], [_WEATHER])


def _broken_arguments(chance: random.Random) -> _Case:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"place": '}}
    messages = [_turn("user", "Weather?"), _turn("assistant", "", tool_calls=[call])]
    return _Case("arguments that are not JSON", messages, [_WEATHER], "message")


# --- all the cases ------------------------------------------------------------------------------------------

_CASES: list[Callable[[random.Random], _Case]] = [
    lambda chance: _Case("a question and its answer", _talk(chance, 1)),
    lambda chance: _Case("several turns", _talk(chance, chance.randint(2, 5))),
    lambda chance: _Case("very many turns", _talk(chance, 60)),
    lambda chance: _Case("a system message", [_turn("system", "Be brief."), *_talk(chance, 2)]),
    lambda chance: _Case("an empty system message", [_turn("system", ""), *_talk(chance, 1)]),
    lambda chance: _Case("a developer message", [_turn("developer", "Be brief."), *_talk(chance, 1)]),
    lambda chance: _Case("an empty answer", [*_talk(chance, 1), _turn("user", "Say nothing."), _turn("assistant", "")]),
    lambda chance: _Case("an empty question", [_turn("user", ""), _turn("assistant", "You said nothing.")]),
    lambda chance: _Case("the same turns again", _talk(chance, 1) * 3),
    _very_long,
    *(_script(what, text) for what, text in _SCRIPTS.items()),
    _nested_call,
    _parallel_calls,
    _last_call,
    lambda chance: _Case("an unknown role", [_turn("narrator", "Once upon a time"), *_talk(chance, 1)], fault="roles"),
    lambda chance: _Case("an assistant that begins", [_turn("assistant", "Hello!"), *_talk(chance, 1)], fault="roles"),
    lambda chance: _Case("two users in a row", [_turn("user", "Hello?"), *_talk(chance, 1)], fault="roles"),
    lambda chance: _Case(
        "a late system message",
        [*_talk(chance, 1), _turn("system", "Now be brief."), _turn("assistant", "Yes.")],
        fault="roles",
    ),
    lambda chance: _Case(
        "a tool result without a call",
        [_turn("user", "Hello?"), _turn("tool", "3"), _turn("assistant", "Hello.")],
        fault="roles",
    ),
    lambda chance: _Case("an empty conversation", [], fault="message"),
    lambda chance: _Case("content that is a number", [_turn("user", 3), _turn("assistant", "Four.")], fault="message"),
    lambda chance: _Case("content that is null", [_turn("user", None), *_talk(chance, 1)[1:]], fault="message"),
    _broken_arguments,
]
