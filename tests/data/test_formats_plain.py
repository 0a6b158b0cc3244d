"""The formats without turns: text, token ids, histories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from postlude.data.example import BadRecord, Format, Text, Tokens
from postlude.data.formats.history import History
from postlude.data.formats.text import PlainText
from postlude.data.formats.tokens import TokenIds


def refusal(format: Format, record: Any) -> str:
    with pytest.raises(BadRecord) as refused:
        format.parse(record)
    return str(refused.value)


@pytest.mark.capability("Train on plain text")
def test_text() -> None:
    assert PlainText().parse({"text": " a\n"}) == [Text([(" a\n", 1.0)])]
    assert PlainText(field="body").parse({"body": ""}) == [Text([("", 1.0)])]
    assert "its 'text' is a number, not text" in refusal(PlainText(), {"text": 3})
    assert "its 'text' is null" in refusal(PlainText(), {"text": None})
    assert "no column 'text'. Known: body" in refusal(PlainText(), {"body": "x"})


@pytest.mark.capability("Train on token ids made elsewhere")
@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans()), min_size=1, max_size=20))
def test_token_ids_with_labels_or_weights(tokens: list[tuple[int, bool]]) -> None:
    ids = [token for token, _ in tokens]
    weights = [float(trained) for _, trained in tokens]
    labels = [token if trained else -100 for token, trained in tokens]
    record = {"input_ids": ids, "w": weights, "l": labels}
    assert TokenIds().parse(record) == [Tokens(ids, [1.0] * len(ids))]
    assert TokenIds(weights="w").parse(record) == [Tokens(ids, weights)]
    assert TokenIds(labels="l").parse(record) == [Tokens(ids, weights)]


@pytest.mark.parametrize(
    ("keys", "record", "expected"),
    [
        ({}, {"input_ids": []}, "is empty"),
        ({}, {"input_ids": [1, -3]}, "the id -3 at position 2"),
        ({}, {"input_ids": [1, 2.0]}, "entry 2 of its 'input_ids' is a number, not a whole number"),
        ({}, {"input_ids": [1, True]}, "entry 2"),
        ({}, {"input_ids": [None]}, "entry 1 of its 'input_ids' is null"),
        ({}, {"input_ids": "1 2"}, "is text, not a list"),
        ({"weights": "w"}, {"input_ids": [1, 2], "w": [1]}, "has 1 entries for 2 tokens"),
        ({"weights": "w"}, {"input_ids": [1, 2], "w": [1, -1]}, "the weight of token 2"),
        ({"weights": "w"}, {"input_ids": [1]}, "no column 'w'"),
        ({"labels": "l"}, {"input_ids": [1, 2], "l": [2, -100]}, "labels are not shifted"),
        ({"labels": "l"}, {"input_ids": [1, 2], "l": [1]}, "has 1 entries for 2 tokens"),
    ],
)
def test_token_ids_that_are_refused(keys: dict[str, str], record: Any, expected: str) -> None:
    assert expected in refusal(TokenIds(**keys), record)


def test_weights_and_labels_are_not_given_together() -> None:
    with pytest.raises(ValidationError, match="not both"):
        TokenIds(weights="w", labels="l")


@pytest.mark.capability("Train on interaction histories")
@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=6), st.one_of(st.none(), st.integers(1, 8)))
def test_a_history_trains_its_last_items(items: list[str], last: int | None) -> None:
    format = History(separator=" > ", train_last=last)
    [example] = format.parse({"items": items})
    assert isinstance(example, Text)
    assert "".join(text for text, _ in example.pieces) == " > ".join(items)
    trained = "".join(text for text, weight in example.pieces if weight)
    assert trained == " > ".join(items[-last:] if last else items)
    assert {weight for _, weight in example.pieces} <= {0.0, 1.0}


def test_items_that_are_objects() -> None:
    format = History(items="films", item="{title} [{rating:d}/10]", train_last=1)
    films = [{"title": "Heat (1995)", "rating": 9}, {"title": "Up (2009)", "rating": 8, "more": None}]
    assert format.parse({"films": films}) == [Text([("Heat (1995) [9/10]\n", 0.0), ("Up (2009) [8/10]", 1.0)])]


@pytest.mark.parametrize(
    ("keys", "items", "expected"),
    [
        ({}, [], "is empty"),
        ({}, None, "is null"),
        ({}, ["a", None], "item 2 is null"),
        ({}, [{"title": "a"}], "the key 'item' makes a text of an object"),
        ({}, ["a\nb"], "holds the separator"),
        ({"item": "{title}"}, ["a"], "item 1 is text, not an object"),
        ({"item": "{title}"}, [{"title": None}], "item 1 has no 'title'; it has title"),
        ({"item": "{title}"}, [{}], "it has nothing"),
        ({"item": "{title:d}"}, [{"title": "a"}], "does not fit the template"),
    ],
)
def test_histories_that_are_refused(keys: dict[str, Any], items: Any, expected: str) -> None:
    assert expected in refusal(History(**keys), {"items": items})


@pytest.mark.parametrize("template", ["title", "{}", "{0}", "{title"])
def test_templates_that_name_no_key(template: str) -> None:
    if template == "{0}":
        assert "has no '0'" in refusal(History(item=template), {"items": [{"title": "a"}]})
    else:
        with pytest.raises(ValidationError):
            History(item=template)


def test_histories_of_real_logs(shared_data: Path, tmp_path: Path) -> None:
    from postlude.data.sources.query import Query

    ratings = shared_data / "movietweetings_100k" / "ratings.dat"
    query = Query.model_validate(
        {
            "query": "SELECT list(ratings ORDER BY time, item) AS items FROM ratings GROUP BY user",
            "tables": {
                "ratings": {
                    "path": str(ratings),
                    "delimiter": "::",
                    "columns": {"user": "BIGINT", "item": "VARCHAR", "rating": "INTEGER", "time": "BIGINT"},
                }
            },
        }
    )
    records = query.open(str(tmp_path))
    lines = 0
    for record in records.read(0):
        [example] = History(item="{item}:{rating}").parse(record)  # type: ignore[arg-type]
        assert isinstance(example, Text)
        lines += example.pieces[0][0].count("\n") + 1
    assert lines == len(ratings.read_text().splitlines())
