"""Readers of one view are updated by whoever looks, and say what is wrong."""

from __future__ import annotations

import pytest

from postlude.dashboard import kept as module
from postlude.dashboard.followed import Followed
from postlude.dashboard.kept import kept
from postlude.runs import Run
from postlude.storage import CorruptError


class Reading:
    """A reader of ours: what came is put into it."""

    def __init__(self, stage: object) -> None:
        self.new, self.told, self.damages = 0, 0, list[str]()
        self.error: Exception | None = None

    def update(self) -> bool:
        if self.error:
            raise self.error
        self.told, self.new = self.told + self.new, 0
        return self.told > 0


def test_all_tabs_share_a_reader(run: Run) -> None:
    followed = Followed(run)
    assert kept(followed, "sft", Reading) is kept(followed, "sft", Reading)
    assert kept(followed, "more", Reading) is not kept(followed, "sft", Reading)
    assert kept(Followed(run), "sft", Reading) is not kept(followed, "sft", Reading)


def test_a_look_tells_what_came_and_what_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    reader = Reading(None)
    own = module.Kept(reader)
    assert own.look(lambda r: r.told, again=True) == 0
    assert own.look(lambda r: r.told, again=False) is None
    reader.new = 3
    assert own.look(lambda r: r.told, again=False) == 3
    reader.damages = ["a line is damaged"]
    own.look(lambda r: r.told)
    assert own.trouble == "a line is damaged"
    reader.error = CorruptError("the file is damaged")
    assert own.look(lambda r: r.told, again=False) == 3  # what was read stands, and the trouble is new
    assert own.trouble == "the file is damaged"
    assert own.look(lambda r: r.told, again=False) is None

    def gone(reader: Reading) -> int:
        raise CorruptError("it is gone")

    reader.error = None
    assert own.look(gone) is None
    assert own.trouble == "it is gone"
