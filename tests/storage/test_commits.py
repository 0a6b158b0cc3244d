"""A committed folder is whole, whoever is killed while it is made, and damage to it is found."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from postlude import storage
from postlude.storage import files

Start = Callable[..., BaseProcess]


def _write(uri: str, contents: Mapping[str, bytes]) -> dict[str, storage.Digest]:
    digests = {}
    for path, content in contents.items():
        with storage.open_hashed(storage.join(uri, path)) as file:
            for start in range(0, len(content), 1000):
                file.write(content[start : start + 1000])
            assert file.tell() == len(content)
        digests[path] = file.digest
    return digests


CONTENTS = {"a": b"", "deep/b": os.urandom(12_345)}


def test_a_folder_is_there_once_it_is_committed(place: str) -> None:
    storage.begin(place)
    digests = _write(place, CONTENTS)
    assert not storage.is_committed(place)
    with pytest.raises(storage.NotFound, match="never committed"):
        storage.verify(place)
    storage.commit(place, digests, {"step": 7, "loss": float("nan")})
    assert storage.is_committed(place)
    marker = storage.verify(place)
    assert marker.files == digests
    assert marker.extra["step"] == 7
    assert marker.extra["loss"] != marker.extra["loss"]


def test_begin_clears_what_was_left(place: str) -> None:
    storage.begin(place)
    storage.commit(place, _write(place, CONTENTS))
    storage.begin(place)
    assert not storage.is_committed(place)
    assert storage.list_directory(place) == []


def test_a_discarded_folder_is_gone(place: str) -> None:
    storage.begin(place)
    storage.commit(place, _write(place, CONTENTS))
    storage.discard(place)
    assert not storage.exists(place)


def test_a_folder_that_is_half_discarded_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "step")
    storage.begin(uri)
    storage.commit(uri, _write(uri, CONTENTS))

    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.discard(uri)
    assert not storage.is_committed(uri)


def test_a_file_cut_short_is_not_committed(place: str) -> None:
    storage.begin(place)
    digests = _write(place, CONTENTS)
    storage.write_bytes(storage.join(place, "deep/b"), b"short")
    with pytest.raises(ValueError, match="5 bytes"):
        storage.commit(place, digests)
    assert not storage.is_committed(place)


def _flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.capability("Damage to a checkpoint is found before it is used")
def test_any_damage_is_found_and_the_file_named(near_place: str) -> None:
    storage.begin(near_place)
    storage.commit(near_place, _write(near_place, CONTENTS), {"step": 7})
    for path in ("deep/b", "COMMITTED"):
        uri = storage.join(near_place, path)
        whole = storage.read_bytes(uri)
        for position in random.Random(0).sample(range(len(whole)), 40):
            storage.write_bytes(uri, _flip(whole, position))
            with pytest.raises(storage.CorruptError, match=path):
                storage.verify(near_place)
        storage.write_bytes(uri, whole[:-1])
        with pytest.raises(storage.CorruptError, match=path):
            storage.verify(near_place)
        storage.write_bytes(uri, whole)
    storage.verify(near_place)
    storage.remove(storage.join(near_place, "a"))
    with pytest.raises(storage.CorruptError, match="/a' is missing"):
        storage.verify(near_place)


def test_a_digest_is_known_only_when_the_file_is_closed(tmp_path: Path) -> None:
    with storage.open_hashed(str(tmp_path / "x")) as file, pytest.raises(ValueError, match="still being written"):
        _ = file.digest


def test_torch_saves_into_a_hashed_file(place: str) -> None:
    tensor = torch.arange(1000.0)
    storage.begin(place)
    with storage.open_hashed(storage.join(place, "tensor.pt")) as file:
        torch.save(tensor, file)
    storage.commit(place, {"tensor.pt": file.digest})
    storage.verify(place)
    with storage.open_file(storage.join(place, "tensor.pt")) as saved:
        assert torch.equal(torch.load(saved), tensor)


def _write_shard(uri: str, rank: int) -> dict[str, storage.Digest]:
    return _write(uri, {f"shard-{rank}": random.Random(rank).randbytes(10_000 + rank)})


def test_several_processes_write_and_one_commits(tmp_path: Path) -> None:
    uri = str(tmp_path / "step")
    storage.begin(uri)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        digests = [shard.result() for shard in [pool.submit(_write_shard, uri, rank) for rank in range(4)]]
    storage.commit(uri, {path: digest for shard in digests for path, digest in shard.items()})
    assert sorted(storage.verify(uri).files) == [f"shard-{rank}" for rank in range(4)]


def test_a_full_disk_commits_nothing_and_spares_the_commit_before(small_disk: Path) -> None:
    before, after = str(small_disk / "step-1"), str(small_disk / "step-2")
    storage.begin(before)
    storage.commit(before, _write(before, {"x": bytes(100_000)}))
    storage.begin(after)
    with pytest.raises(storage.StorageFull, match="step-2"):
        _write(after, {"x": bytes(300_000)})
    storage.discard(after)
    storage.verify(before)
    storage.begin(after)
    storage.commit(after, _write(after, {"x": bytes(100_000)}))
    storage.verify(after)


def _commit_for_ever(uri: str, seed: int) -> None:
    chance = random.Random(seed)
    while True:
        storage.begin(uri)
        contents = {f"part-{index}": chance.randbytes(chance.randrange(20_000)) for index in range(3)}
        storage.commit(uri, _write(uri, contents))
        time.sleep(0.003)


def test_a_writer_killed_at_any_moment_leaves_a_whole_folder_or_none(tmp_path: Path, start: Start) -> None:
    uri = str(tmp_path / "step")
    chance = random.Random(1)
    outcomes: list[bool] = []
    while len(outcomes) < 20 or len(set(outcomes)) < 2:
        writer = start(_commit_for_ever, uri, len(outcomes))
        while not storage.exists(uri):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        writer.kill()
        writer.join()
        outcomes.append(storage.is_committed(uri))
        if outcomes[-1]:
            storage.verify(uri)
