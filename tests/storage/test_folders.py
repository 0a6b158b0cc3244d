"""Folders that other libraries write appear whole, and come back from a remote place as they were."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from postlude import storage
from postlude.storage import files

Start = Callable[..., BaseProcess]


def _fill(folder: str, contents: dict[str, bytes]) -> None:
    for path, content in contents.items():
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


CONTENTS = {"config.json": b"{}", "weights/one.bin": os.urandom(5000), ".hidden": b"x"}


def test_a_new_folder_is_committed_and_fetched(place: str, tmp_path: Path) -> None:
    uri = storage.join(place, "model")
    with storage.new_folder(uri, {"step": 3}) as folder:
        _fill(folder, CONTENTS)
        assert not storage.exists(uri)
    assert set(storage.verify(uri).files) == set(CONTENTS)
    fetched = storage.fetch(uri, str(tmp_path / "copy"))
    assert {path: storage.read_bytes(storage.join(fetched, path)) for path in CONTENTS} == CONTENTS
    assert storage.list_directory(place) == ["model"]


def test_a_new_folder_replaces_the_old_one_and_is_fetched_anew(place: str, tmp_path: Path) -> None:
    uri = storage.join(place, "model")
    for content in (b"first", b"second"):
        with storage.new_folder(uri) as folder:
            _fill(folder, {"only " + content.decode(): content})
        fetched = storage.fetch(uri, str(tmp_path / "copy"))
        assert set(storage.list_directory(fetched)) == {"COMMITTED", "only " + content.decode()}


def test_nothing_is_removed_under_the_name_that_readers_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "model")
    removed = []
    monkeypatch.setattr(files.shutil, "rmtree", removed.append)
    for _ in range(2):
        with storage.new_folder(uri) as folder:
            _fill(folder, CONTENTS)
    assert removed
    assert uri not in removed


def test_after_an_error_the_old_folder_stands(place: str) -> None:
    uri = storage.join(place, "model")
    with storage.new_folder(uri) as folder:
        _fill(folder, CONTENTS)

    def fail() -> None:
        with storage.new_folder(uri) as folder:
            _fill(folder, {"config.json": b"other"})
            raise RuntimeError("the writer failed")

    with pytest.raises(RuntimeError):
        fail()
    storage.verify(uri)
    assert storage.read_bytes(storage.join(uri, "config.json")) == b"{}"
    assert storage.list_directory(place) == ["model"]


@pytest.mark.parametrize("how", ["safetensors", "tokenizers", "pyarrow", "python"])
def test_a_full_disk_is_told_whichever_library_writes(small_disk: Path, how: str) -> None:
    """Those that are not written in Python have errors of their own."""
    import numpy as np
    import pyarrow as pa
    import torch
    from pyarrow import parquet
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    chance = np.random.default_rng(0)
    values = chance.standard_normal(100_000)
    words = Tokenizer(models.WordLevel({f"word {number}": number for number in range(30_000)}, unk_token="word 0"))
    writers: dict[str, Callable[[str], object]] = {
        "safetensors": lambda path: save_file({"values": torch.from_numpy(values)}, path),
        "tokenizers": words.save,
        "pyarrow": lambda path: parquet.write_table(pa.table({"values": values}), path),
        "python": lambda path: Path(path).write_bytes(values.tobytes()),
    }
    uri = str(small_disk / "model")
    with pytest.raises(storage.StorageFull, match="room"), storage.new_folder(uri) as folder:
        writers[how](f"{folder}/file.npy")
    assert os.listdir(small_disk) == []


def test_what_is_raised_for_another_reason_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.new_folder(str(tmp_path / "model")):
        (tmp_path / "not there").read_text()
    with pytest.raises(RuntimeError, match="code 28"), storage.new_folder(str(tmp_path / "model")):
        raise RuntimeError("the server answered with code 28")


def test_damage_on_the_way_is_found(tmp_path: Path) -> None:
    uri = f"memory://{os.urandom(4).hex()}/model"
    with storage.new_folder(uri) as folder:
        _fill(folder, CONTENTS)
    storage.write_bytes(storage.join(uri, "weights/one.bin"), bytes(5000))
    with pytest.raises(storage.CorruptError, match=r"weights/one\.bin"):
        storage.fetch(uri, str(tmp_path / "copy"))
    assert not storage.exists(str(tmp_path / "copy"))


def _replace_for_ever(uri: str) -> None:
    number = 0
    while True:
        number += 1
        with storage.new_folder(uri) as folder:
            _fill(folder, {f"part-{index}": str(number).encode() for index in range(5)})


def test_a_writer_killed_at_any_moment_leaves_a_whole_folder_or_none(tmp_path: Path, start: Start) -> None:
    uri = str(tmp_path / "stage" / "model")
    chance = random.Random(0)
    for _ in range(10):
        writer = start(_replace_for_ever, uri)
        time.sleep(0.01 + 0.02 * chance.random())
        writer.kill()
        writer.join()
        if storage.exists(uri):
            assert len(storage.verify(uri).files) == 5


def test_a_committed_folder_is_copied_whole_and_a_damaged_one_is_not(place: str, tmp_path: Path) -> None:
    uri, target = storage.join(place, "model"), str(tmp_path / "exported")
    with storage.new_folder(uri, {"step": 3}) as folder:
        _fill(folder, CONTENTS)
    storage.copy_folder(uri, target)
    assert storage.verify(target) == storage.read_marker(uri)
    storage.write_bytes(storage.join(uri, "config.json"), b"[]")
    with pytest.raises(storage.CorruptError, match=r"config\.json"):
        storage.copy_folder(uri, str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
