"""YAML text becomes values that know their place, or one clear error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.manifest.problem import ManifestError
from postlude.manifest.text import parse, parse_inline
from postlude.manifest.value import Origin, Value

scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(min_size=1, max_size=6), trees, max_size=4))
def test_json_is_read_as_json(tree):
    text = json.dumps(tree, allow_nan=True).replace("-Infinity", "-.inf").replace("Infinity", ".inf")
    if ".inf" not in text:
        assert parse(text, "x.yaml").plain() == tree


def test_numbers_and_words_are_those_of_yaml_1_2():
    value = parse("a: [1e-5, 017, 0x1f, yes, no, on, True, ~, 2024-01-01, '5', 1:30, =]", "x.yaml")
    assert value.plain()["a"] == [1e-5, 17, 31, "yes", "no", "on", True, None, "2024-01-01", "5", "1:30", "="]


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    assert parse("﻿name: x".encode(), "x.yaml").plain() == {"name": "x"}


def test_an_alias_repeats_what_its_anchor_holds():
    assert parse("a: &one {b: 1}\nc: *one", "x.yaml").plain() == {"a": {"b": 1}, "c": {"b": 1}}


@given(
    st.dictionaries(
        st.sampled_from(["name", "defaults", "stages", "data"]),
        st.dictionaries(st.sampled_from("abcd"), st.integers(0, 99) | st.sampled_from(["word", "1e-5"]), min_size=1),
        min_size=1,
    )
)
def test_every_key_and_value_is_where_it_is_said_to_be(tree):
    text = "".join(f"{top}:\n" + "".join(f"  {k}:   {v}\n" for k, v in below.items()) for top, below in tree.items())
    lines = text.splitlines()

    def word_at(origin: Origin) -> str:
        return lines[origin.line - 1][origin.column - 1 :].split(":")[0].strip()

    def check(value: Value) -> None:
        if not value.is_mapping:
            assert word_at(value.origin) in (str(value.content), "1e-5")
            return
        for key, below in value.content.items():
            assert word_at(below.key_origin) == key
            check(below)

    check(parse(text, "x.yaml"))


@pytest.mark.capability("Errors in a manifest's YAML are told with file, line and column")
@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "1:1", "empty"),
        ("# nothing\n", "1:1", "empty"),
        ("---\n", "1:1", "empty"),
        ("- a\n- b\n", "1:1", "mapping"),
        ("just text", "1:1", "mapping"),
        ("a: 1\nb: 2\na: 3\n", "3:1", "a: this key is there twice, first at x.yaml:1:1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "4:3", "a.b: this key is there twice"),
        ("a:\n\tb: 1\n", "2:1", "tab"),
        ("\ta: 1", "1:1", "tab"),
        ("a: [1, 2\n", "2:1", "not YAML"),
        ("a: 'open", "1:9", "not YAML"),
        ("a: b: c", "1:5", "not YAML"),
        ("a: *nothing", "1:4", "alias"),
        ("a: &here [1, *here]", "1:4", "alias"),
        ("a: !custom 1", "1:4", "tag"),
        ("a: !!set {b}", "1:4", "tag"),
        ("a: !!int word", "1:4", "tag"),
        ("? [a]\n: 1", "1:3", "key must be text"),
        ("<<: {a: 1}", "1:1", "merge keys"),
        ("a: 1\n---\nb: 2\n", "2:1", "single document"),
        ("a: \x07", "1:4", "U+0007"),
        (r'a: "\ud83d"', "1:4", "half of a character"),
        (b"a: 1\nb: caf\xe9\n", "2:7", "not UTF-8"),
        ("a: 1".encode("utf-16"), "1:1", "not UTF-8"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_place(text, place, what):
    with pytest.raises(ManifestError) as refused:
        parse(text, "x.yaml")
    (problem,) = refused.value.problems
    assert str(problem).startswith(f"x.yaml:{place}: ")
    assert what in str(problem)
    assert str(problem) in str(refused.value)


def test_all_duplicates_are_told_at_once():
    with pytest.raises(ManifestError) as refused:
        parse("a: 1\na: 2\nb: {c: 1, c: 2}\n", "x.yaml")
    assert [problem.key for problem in refused.value.problems] == ["a", "b.c"]


@pytest.mark.parametrize("text", ["*.jsonl", "[1", "a: b: c", "!x 1"])
def test_a_value_of_the_command_line_that_is_no_yaml_is_refused_with_the_assignment(text):
    with pytest.raises(ManifestError, match="command line 'k=") as refused:
        parse_inline(text, Origin("command line", assignment=f"k={text}"))
    assert len(refused.value.problems) == 1


def test_aliases_stand_for_a_bounded_number_of_values():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ManifestError, match="aliases stand for more than 10,000 values") as raised:
        parse("\n".join(rows), "x.yaml")
    assert len(raised.value.problems) == 1
    assert len(parse("a: &a [1, 2]\nb: [" + "*a, " * 999 + "]", "x.yaml").plain()["b"]) == 999


def test_collections_within_each_other_have_a_bounded_depth():
    with pytest.raises(ManifestError, match="depth"):
        parse("a: " + "[" * 5000, "x.yaml")
    with pytest.raises(ManifestError, match="depth"):
        parse_inline("{a: " * 500, Origin("command line", assignment="a=..."))
