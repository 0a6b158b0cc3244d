"""The source ``hub``: data sets that the package ``datasets`` loads."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from postlude.data.sources.hub import Hub
from postlude.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": f"{i} ü"}], "n": i} for i in range(20)]


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the hub has them, and a cache of its own for the package."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.capability("Read a data set of the Hugging Face hub by name")
def test_a_split_is_read_with_random_access(hub_folder: Path, tmp_path: Path) -> None:
    records = Hub(hub=str(hub_folder)).open(str(tmp_path / "cache"))
    assert (records.groups, records.files, records.seekable) == ([20], [[0]], True)
    assert records.read(0) == ROWS
    assert records.read(0, [7, 0, 7]) == [ROWS[7], ROWS[0], ROWS[7]]
    assert records.read(0, []) == []
    assert records.where(0, 7) == f"{hub_folder} (train), row 8"
    again = pickle.loads(pickle.dumps(records))
    assert again.read(0, [3]) == [ROWS[3]]
    part = Hub(hub=str(hub_folder), split="train[5:7]").open(str(tmp_path / "cache"))
    assert part.read(0) == ROWS[5:7]


def test_the_fingerprint_follows_split_and_files(hub_folder: Path, tmp_path: Path) -> None:
    def fingerprint(split: str = "train") -> str:
        return Hub(hub=str(hub_folder), split=split).open(str(tmp_path / "cache")).fingerprint

    first = fingerprint()
    assert fingerprint() == first != fingerprint("test")
    (hub_folder / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert fingerprint() != first


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hub": "nobody/has-this"}, "hub cannot be reached"),
        ({"hub": "{folder}", "split": "validation"}, "split 'validation'"),
        ({"hub": "{folder}", "subset": "german"}, "german"),
        ({"hub": "{folder}", "split": "train[:0]"}, "no data"),
    ],
)
def test_what_cannot_be_loaded(keys: dict[str, str], expected: str, hub_folder: Path, tmp_path: Path) -> None:
    source = Hub(**{name: value.replace("{folder}", str(hub_folder)) for name, value in keys.items()})
    with pytest.raises(DataError) as refused:
        source.open(str(tmp_path / "cache"))
    assert expected in str(refused.value)


def test_files_that_datasets_cannot_read(hub_folder: Path, tmp_path: Path) -> None:
    (hub_folder / "train.jsonl").write_text('{"n": 1}\n{"n": \n')
    with pytest.raises(DataError, match="cannot be read"):
        Hub(hub=str(hub_folder)).open(str(tmp_path / "cache"))
