"""Moving a stage aside and taking one over survive a failure at every single operation of the storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.runs import Identity, Run, artifact_digest, find_finished_elsewhere, revisions, set_aside, take_over
from postlude.storage import files

WRITES = ("write_bytes", "remove", "open_file")


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Raise at the storage operation of this number, counted from 0: before it is done. The list gathers them all."""
    done: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done.append(f"{name} {arguments}")
            if len(done) == number + 1:
                raise Killed
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            wrapped = counted(name, getattr(files, name))
            for module in (files, storage):
                patch.setattr(module, name, wrapped)
        for name in ("rename", "link", "replace"):
            patch.setattr(f"os.{name}", counted(name, getattr(__import__("os"), name)))
        yield done


def finish(run: Run, name: str, identity: Identity, content: str = "weights") -> None:
    """A finished stage with everything that one has."""
    run.write_manifest_lock("name: x\n")
    stage = run.stage(name)
    identity.write(stage.identity_uri)
    stage.enter("running")
    for step in (1, 2):
        stage.metrics.append({"step": step, "loss": 1.0 / step}, sync=True)
        storage.begin(stage.checkpoint_uri(step))
        storage.commit(stage.checkpoint_uri(step), {})
    writer = stage.examples_writer()
    writer.write(1, 0, [("chats:1", "chats", 0.5, 3)])
    writer.flush()
    with stage.write_artifact() as folder:
        storage.write_text(storage.join(folder, "model.safetensors"), content)
        storage.write_text(storage.join(folder, "lineage.json"), "{}")
    stage.enter("done", steps=2)


def check_set_aside(run: Run, digest: str) -> None:
    assert not run.stage("a").has_begun()
    (earlier,) = revisions(run, "a")
    storage.verify(earlier.artifact)
    assert artifact_digest(earlier.artifact) == digest
    assert [line["step"] for line in earlier.metrics.read()] == [1, 2]
    assert len(earlier.read_examples()) == 1
    assert earlier.identity() == Identity(config={"lr": 1})


def test_killed_anywhere_a_stage_is_moved_aside_whole(place: str) -> None:
    number = 0
    while True:
        run = Run(storage.join(place, f"run{number}"))
        finish(run, "a", Identity(config={"lr": 1}))
        digest = artifact_digest(run.stage("a").artifact)
        try:
            with killed_at(number):
                set_aside(run, "a")
        except Killed:
            stage = run.stage("a")
            if stage.has_begun():  # what stands there is whole, and says what it is
                assert stage.is_done()
                assert stage.identity() == Identity(config={"lr": 1})
                assert set_aside(run, "a") == 1
            else:  # it counts as not begun: what a run does then
                stage.clear()
            check_set_aside(run, digest)
            number += 1
            continue
        check_set_aside(run, digest)
        break
    assert number > 3


def test_killed_anywhere_a_stage_is_taken_over_whole_or_has_not_begun(place: str) -> None:
    identity = Identity(config={"lr": 1})
    number = 0
    while True:
        above = storage.join(place, f"folder{number}")
        first, second = Run(storage.join(above, "first")), Run(storage.join(above, "second"))
        finish(first, "a", identity)
        second.write_manifest_lock("name: second\n")
        source = find_finished_elsewhere(second)[identity.fingerprint]
        try:
            with killed_at(number):
                take_over(second.stage("a"), source, replace(identity, revision=3))
            was_killed = False
        except Killed:
            was_killed = True
            if not second.stage("a").is_done():
                assert not second.stage("a").has_begun()
                take_over(second.stage("a"), source, replace(identity, revision=3))
        stage = second.stage("a")
        assert stage.is_done()
        storage.verify(stage.artifact)
        storage.verify(source.artifact)
        assert artifact_digest(stage.artifact) == artifact_digest(source.artifact)
        assert stage.metrics.read() == source.metrics.read()
        made = stage.identity()
        assert made is not None
        assert (made.fingerprint, made.revision, made.taken_over_from) == (identity.fingerprint, 3, "first")
        if not was_killed:
            break
        number += 1
    assert number > 3


def test_a_damaged_artifact_is_not_taken_over(tmp_path: Path) -> None:
    first, second = Run(f"{tmp_path}/first"), Run(f"{tmp_path}/second")
    finish(first, "a", Identity())
    Path(first.stage("a").artifact, "model.safetensors").write_text("weighty")
    with pytest.raises(storage.CorruptError, match=r"model\.safetensors"):
        take_over(second.stage("a"), first.stage("a"), Identity())
    assert not second.stage("a").has_begun()


def test_what_has_a_second_name_is_not_changed_by_a_new_revision(tmp_path: Path) -> None:
    first, second = Run(f"{tmp_path}/first"), Run(f"{tmp_path}/second")
    finish(first, "a", Identity())
    take_over(second.stage("a"), first.stage("a"), Identity())
    second.stage("a").metrics.append({"step": 3})
    second.stage("a").clear()
    storage.verify(first.stage("a").artifact)
    assert [line["step"] for line in first.stage("a").metrics.read()] == [1, 2]


def test_an_identity_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    identity = Identity({"seed": 1}, {"a": "f"}, {"data.x": {"/p/x.jsonl": "c"}}, {"recipe": "1"}, {"a": 2}, 4)
    uri = str(tmp_path / "identity.json")
    identity.write(uri)
    assert Identity.read(uri) == identity
    assert Identity.read(str(tmp_path / "none.json")) is None
    Path(uri).write_text(Path(uri).read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(storage.CorruptError, match="digest"):
        Identity.read(uri)
