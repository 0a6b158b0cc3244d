"""Folders for temporary files go with their process, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from postlude import storage
from postlude.storage import scratch


def test_a_folder_goes_with_its_context(tmp_path: Path) -> None:
    with storage.scratch_folder("test", str(tmp_path)) as folder:
        assert Path(folder).parent == tmp_path
        Path(folder, "inner").mkdir()
        Path(folder, "inner", "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from postlude import storage
folder = storage.Scratch("test", sys.argv[1])
(folder.path / "file").write_text("x")
print(folder.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_left_goes_with_the_next_folder_and_what_is_held_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, held = (Path(holder.stdout.readline().strip()) for holder in holders)
        holders[0].kill()
        holders[0].wait()
        assert (killed / "file").exists()
        with storage.scratch_folder("other", str(tmp_path)):
            assert not killed.exists()
            assert (held / "file").exists()
        os.kill(holders[1].pid, signal.SIGTERM)
        holders[1].wait()
        scratch.sweep(str(tmp_path))
        assert list(tmp_path.iterdir()) == []
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def test_what_is_no_folder_of_ours_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".held").write_text("")
    place = tmp_path / "place"
    place.mkdir()
    (place / "other").mkdir()
    (place / "postlude-file").write_text("x")
    (place / "postlude-without-a-lock").mkdir()
    (place / "postlude-link").symlink_to(elsewhere)
    (place / "postlude-pipe").mkdir()
    os.mkfifo(place / "postlude-pipe" / ".held")
    (place / ".new-postlude-begun-0").mkdir()
    names = sorted(entry.name for entry in place.iterdir())
    with storage.scratch_folder("test", str(place)):
        pass
    left = sorted(entry.name for entry in place.iterdir())
    assert set(names) - set(left) <= {"postlude-pipe"}  # it is a folder of this user's that nobody holds
    assert (elsewhere / ".held").exists()


def test_what_was_killed_before_it_had_its_name_goes_later(tmp_path: Path) -> None:
    for name, age in (("old", 2 * 3600), ("new", 1)):
        folder = tmp_path / f".new-postlude-{name}"
        folder.mkdir()
        (folder / ".held").write_text("")
        os.utime(folder, (time.time() - age,) * 2)
    scratch.sweep(str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == [".new-postlude-new"]


def test_a_place_that_may_not_be_written_is_told(read_only_disk: Path) -> None:
    with pytest.raises(storage.NotWritable, match="read-only"):
        storage.Scratch("test", str(read_only_disk))
