"""The filters that look at what a record says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from postlude.data.example import Conversation, Example, Text, Tokens
from postlude.data.filters.dedupe import Dedupe
from postlude.data.filters.filter import Content, Filter, content_of, words
from postlude.data.filters.length import Length
from postlude.data.filters.minhash import MINIMA, MinHashIndex, shingles
from postlude.data.filters.near_dedupe import NearDedupe
from postlude.data.filters.quality import Quality
from postlude.data.formats.messages import Messages


def judged(filter: Filter, records: Sequence[Any]) -> list[str | None]:
    """The filter's verdicts on records whose text is in the column ``text``; ``turns`` by default 1."""
    judge = filter.start(lambda record: Content(record["text"], record.get("turns", 1)))
    return [judge(record) for record in records]


def verdict(filter: Filter, text: str, turns: int = 1) -> str | None:
    return judged(filter, [{"text": text, "turns": turns}])[0]


def test_what_a_record_says() -> None:
    call = {"type": "function", "function": {"name": "times", "arguments": {"a": [6, 7.5]}}}
    chat = Conversation(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1.0}]
    )
    assert content_of([chat]) == Content("hi\nfunction\ntimes\n6\n7.5", 2)
    longer = Conversation([*chat.messages, {"role": "tool", "content": "42"}])
    assert content_of([chat, longer]) == Content("hi\nfunction\ntimes\n6\n7.5\n42", 3)
    assert content_of([Text([("a", 0.0), ("b", 1.0)])]) == Content("ab", 2)
    examples: list[Example] = [Tokens([3, 4], [1.0, 1.0])]
    assert content_of(examples) == Content("3 4", 1)


# --- length -------------------------------------------------------------------------------------------------


@pytest.mark.capability("Filter by length in characters, words and turns")
@given(st.text(st.sampled_from("ab \n"), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_length(text: str, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    for what, count in (("characters", len(text)), ("words", len(text.split()))):
        found = verdict(Length.model_validate({f"min_{what}": low, f"max_{what}": high}), text)
        assert (found is None) == (low <= count <= high)
        if found is not None:
            assert found == (f"fewer than {low} {what}" if count < low else f"more than {high} {what}")
    assert (verdict(Length(min_turns=low), text, turns=5) is None) == (low <= 5)


def test_words_in_scripts_without_spaces() -> None:
    assert words("法国 的 capital, 巴黎!") == ["法", "国", "的", "capital,", "巴", "黎", "!"]
    assert len(words("राजधानी क्या है")) == 3


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, "at least one bound"), ({"min_words": 3, "max_words": 2}, "nothing would be kept")]
)
def test_bounds_that_make_no_sense(keys: dict[str, int], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Length.model_validate(keys)


# --- quality ------------------------------------------------------------------------------------------------


@pytest.mark.capability("Filter by rules of quality that need no language")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join(["Buy now!"] * 5), "repeated lines"),
        ("the cat sat on a mat " * 10, "repeated sequences of words"),
        ("0x1F 33 4411 9912 33810 ab", "many digits"),
        ("!!! ??? *** --- abcd", "many symbols"),
        ("12 34 +-*/ a 5", "few letters"),
        ("abc \x00\x01\x02", "control characters"),
        ("ab\ufffd", "control characters"),
        (" \n\t ", "no visible character"),
        ("abcd" * 30, "long words"),
    ],
)
def test_quality_drops(text: str, expected: str) -> None:
    assert verdict(Quality(), text) == expected


def test_quality_keeps_real_text_and_other_scripts(shared_data: Path) -> None:
    import json

    from postlude.data.synthetic import synthetic_records

    for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:300]:
        record = json.loads(line)
        assert verdict(Quality(), record["question"] + "\n" + record["answer"]) is None
    cases = [case for case in synthetic_records(Messages(), 90) if case.good]
    texts = {case.what: case.record["messages"][0]["content"] for case in cases}
    for what in ("Arabic, right to left", "Devanagari with vowel signs", "Han without spaces", "Thai"):
        assert verdict(Quality(), texts[what]) is None, what
    assert verdict(Quality(), texts["control characters"]) == "control characters"


def test_each_rule_can_be_switched_off() -> None:
    off = Quality(
        max_repeated_lines=1.0,
        max_repeated_ngrams=1.0,
        min_letters=0.0,
        max_digits=1.0,
        max_symbols=1.0,
        max_control=1.0,
        max_mean_word=1e9,
    )
    for text in ("x\n" * 9, "a b c d e f " * 9, "123", "???", "\x00", "x" * 99):
        assert verdict(off, text) is None


# --- duplicates ---------------------------------------------------------------------------------------------


@pytest.mark.capability("Drop exact duplicates")
@given(st.lists(st.text("aA \n", max_size=4), max_size=12))
def test_the_first_of_equal_texts_stays(texts: list[str]) -> None:
    for filter, key in (
        (Dedupe(), lambda text: tuple(text.casefold().split())),
        (Dedupe(normalize=False), lambda text: text),
    ):
        seen: set[Any] = set()
        for text, found in zip(texts, judged(filter, [{"text": text} for text in texts]), strict=True):
            assert (found is None) == (key(text) not in seen)
            seen.add(key(text))


def test_equal_in_chosen_columns() -> None:
    rows = [{"text": str(i), "id": i, "q": q, "tags": ["a", {"b": 1}]} for i, q in enumerate(["x", "X", "y"])]
    assert judged(Dedupe(), rows) == [None] * 3
    assert [found is None for found in judged(Dedupe(fields=["q"]), rows)] == [True, False, True]
    assert [found is None for found in judged(Dedupe(fields=["q"], normalize=False), rows)] == [True, True, True]
    assert [found is None for found in judged(Dedupe(fields=["tags", "missing"]), rows)] == [True, False, False]


def similarity(one: Sequence[str], other: Sequence[str], length: int = 5) -> float:
    def runs(found: Sequence[str]) -> set[tuple[str, ...]]:
        return {tuple(found[i : i + length]) for i in range(max(len(found) - length + 1, 1))}

    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


@pytest.mark.capability("Drop near duplicates (MinHash)")
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_against_the_exact_similarity(threshold: float) -> None:
    chance = random.Random(5)
    texts: list[list[str]] = []
    for _ in range(30):
        base = [str(chance.randrange(10**6)) for _ in range(chance.randint(60, 120))]
        texts.append(base)
        for _ in range(4):
            other = list(base)
            for _ in range(chance.choice([0, 0, 1, 2, 3, 5, 8])):
                other[chance.randrange(len(other))] = str(chance.randrange(10**6))
            texts.append(other)
    found = judged(NearDedupe(threshold=threshold), [{"text": " ".join(text)} for text in texts])
    margin = 4 * np.sqrt(threshold * (1 - threshold) / MINIMA)  # four standard deviations of the estimate
    kept: list[list[str]] = []
    clear = 0
    for text, reason in zip(texts, found, strict=True):
        nearest = max((similarity(text, other) for other in kept), default=0.0)
        if nearest >= min(threshold + margin, 1.0):
            assert reason == "nearly the same text as an earlier record"
            clear += 1
        elif nearest < threshold - margin:
            assert reason is None
        if reason is None:
            kept.append(text)
    assert clear > 20


def test_near_duplicates_are_the_same_in_every_process() -> None:
    index = MinHashIndex(0.8)
    assert index.add(shingles(["a", "b", "c"], 2))
    assert not index.add(shingles(["a", "b", "c"], 2))
    assert shingles(["a", "b", "c", "a", "b"], 2).tolist() == sorted(
        {*shingles(["a", "b"], 2).tolist(), *shingles(["b", "c"], 2).tolist(), *shingles(["c", "a"], 2).tolist()}
    )
    # Written down once: whoever changes the hashes changes which records a filter drops.
    assert hex(int(shingles(["a", "b"], 2)[0])) == "0x3f3cde4d81f6b878"


@pytest.mark.parametrize("seed", range(3))
def test_an_equal_set_is_found_however_large_the_table_has_grown(seed: int) -> None:
    draws = np.random.default_rng(seed)
    pool = draws.integers(0, 2**63, 400).astype(np.uint64)
    index = MinHashIndex(0.95)
    kept: list[frozenset[int]] = []
    for _ in range(300):
        fresh = frozenset(draws.choice(pool, 8, replace=False).tolist())
        again = kept[draws.integers(len(kept))] if kept else fresh
        for one in (fresh, again):
            assert index.add(np.array(sorted(one), np.uint64)) == (one not in kept)
            kept += [one] if one not in kept else []
    assert len(kept) > 256


def test_short_and_empty_texts() -> None:
    found = judged(NearDedupe(), [{"text": text} for text in ("", "", "one", "ONE", "two words", "")])
    assert [reason is None for reason in found] == [True, True, True, False, True, True]
