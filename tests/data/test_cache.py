"""Files that are made once: of a damaged one nothing is believed, whatever it holds."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from postlude.data.dataset import Dataset
from postlude.data.sources import cache as caches
from postlude.errors import DataError
from postlude.manifest.load import load

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(60)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    """A source for each kind of file that is made once, by how the names of those begin."""
    (folder / "a.jsonl").write_text(LINES)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0))
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return {
        "index": {"path": str(folder / "a.jsonl")},
        "copy": {"path": str(folder / "a.jsonl.gz")},
        "count": {"path": str(folder / "a.jsonl.gz"), "stream": True},
        "rows": {"path": str(folder / "a.parquet")},
        "query": {"query": f"SELECT * FROM '{folder}/a.jsonl'"},
        "kept": {"path": str(folder / "a.jsonl")},
    }


def read(source: dict[str, Any], cache: Path) -> list[str]:
    """The rows of a data set, through all that is made once of it."""
    caches._is_as_named.cache_clear()  # as a process of its own
    manifest = {
        "name": "x",
        "data": {"d": {"source": source, "format": "messages", "filters": ["dedupe", "len(messages) == 2"]}},
        "stages": {"s": {"recipe": "sft", "model": {"path": "x"}, "data": {"d": 1.0}, "steps": 1}},
    }
    dataset = Dataset("d", load(json.dumps(manifest), "x.yaml").manifest.data["d"], str(cache))
    return [
        json.dumps(record, sort_keys=True)
        for group, rows in enumerate(dataset.groups)
        for record, _ in dataset.read(group, range(rows))
    ]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2 // 16 * 16]


def change(content: bytes) -> bytes:
    place = random.Random(len(content)).randrange(len(content))
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


@pytest.mark.capability("A damaged cache is made anew in silence and never believed")
@pytest.mark.parametrize("kind", ["index", "copy", "count", "rows", "query", "kept"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, kind: str) -> None:
    source, cache = sources(tmp_path)[kind], tmp_path / "cache"
    whole = read(source, cache)
    assert len(whole) == len(ROWS)
    damages: list[Callable[[bytes], bytes] | None] = [cut, change, lambda content: b"", None]
    for damage in damages:
        (path,) = [path for path in cache.glob(f"{kind}-*") if path.suffix != ".lock"]
        content = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(content))
        assert read(source, cache) == whole
        assert [other.read_bytes() for other in cache.glob(f"{kind}-*") if other.suffix != ".lock"] == [content]


def test_what_an_earlier_version_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "index-0").write_bytes(b"without a digest")
    path = caches.make_once(str(tmp_path), "index-0", lambda path: Path(path).write_bytes(b"with one") and None)
    assert Path(path).read_bytes() == b"with one"
    assert not (tmp_path / "index-0").exists()


def test_what_an_earlier_version_alone_can_make_has_a_digest_from_now_on(tmp_path: Path) -> None:
    assert caches.find_made(str(tmp_path), "query-0.arrow") is None
    (tmp_path / "query-0.arrow").write_bytes(b"rows")
    path = Path(caches.find_made(str(tmp_path), "query-0.arrow") or "")
    assert path.read_bytes() == b"rows"
    assert path == Path(caches.find_made(str(tmp_path), "query-0.arrow") or "")
    path.write_bytes(b"r")
    with pytest.raises(DataError, match=rf"{path.name}.*Put it back"):
        caches.find_made(str(tmp_path), "query-0.arrow")
