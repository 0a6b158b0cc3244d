"""A checkpoint comes back exactly, and nothing but tensors and plain values is made of what stands in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

from postlude import storage
from postlude.model import checkpoint_reader
from postlude.storage import keys, rules
from postlude.training import checkpoint
from postlude.training.workers import Workers


def saved(uri: str, state: dict[str, Any]) -> str:
    saver = checkpoint.Checkpointer(Workers(), lambda uri, step: None)
    saver.save(uri, 1, state, {"progress": 0.5}, background=False)
    saver.close()
    return uri


def state(scale: float) -> dict[str, Any]:
    weights = {"a": scale * torch.arange(6.0).reshape(2, 3), "b": scale * torch.ones(3, dtype=torch.bfloat16)}
    return {"model": weights, "groups": [{"lr": 0.1 * scale, "betas": (0.9, 0.99), "names": ["a", None], "on": True}]}


@pytest.mark.parametrize("place", ["local", "memory"])
def test_tensors_and_plain_values_come_back(place: str, tmp_path: Path) -> None:
    uri = saved(f"{tmp_path}/step" if place == "local" else "memory://checkpoint-reader/step", state(1.0))
    found = state(0.0)
    assert checkpoint.load(uri, found, Workers()) == {"step": 1, "progress": 0.5}
    for name, tensor in state(1.0)["model"].items():
        assert torch.equal(found["model"][name], tensor)
    assert found["groups"] == state(1.0)["groups"]


@pytest.mark.capability("Nothing but the plan of a checkpoint is made of the pickle that it stands in")
@pytest.mark.parametrize(
    "content", [pickle.dumps(PurePosixPath("x")), pickle.dumps({"a": print}), pickle.dumps({}), b"", b"\x80\x04no"]
)
def test_a_plan_of_other_things_is_refused(tmp_path: Path, content: bytes) -> None:
    uri = saved(str(tmp_path / "step"), state(1.0))
    storage.write_bytes(storage.join(uri, ".metadata"), content)
    with pytest.raises(storage.CorruptError, match="plan of a checkpoint"):
        checkpoint_reader.Reader(uri).read_metadata()


def test_an_encrypted_plan_is_authenticated_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.new_key_file(str(tmp_path / "master.key"))
    encryption = rules.Encryption(key=f"file:{tmp_path / 'master.key'}")
    rules.use([rules.Rule(prefix=str(tmp_path / "runs"), encrypt=encryption)])
    uri = saved(str(tmp_path / "runs" / "step"), state(1.0))
    found = state(0.0)
    assert checkpoint.load(uri, found, Workers()) == {"step": 1, "progress": 0.5}
    assert torch.equal(found["model"]["a"], state(1.0)["model"]["a"])
    plan = tmp_path / "runs" / "step" / ".metadata"
    assert b"postlude" not in plan.read_bytes()
    assert b"torch" not in plan.read_bytes()
    monkeypatch.setattr(checkpoint_reader._PlanReader, "load", lambda self: pytest.fail("it was read"))
    sealed = plan.read_bytes()
    for content in (sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:-1], pickle.dumps({}), b""):
        plan.write_bytes(content)
        with pytest.raises((storage.CorruptError, storage.NotFound)):
            checkpoint_reader.Reader(uri).read_metadata()
    rules.use(())


def test_a_value_that_is_not_plain_is_refused() -> None:
    value = io.BytesIO()
    torch.save(PurePosixPath("x"), value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="PurePosixPath"):
        checkpoint_reader.Planner().load_bytes(None, value)  # type: ignore[arg-type]
