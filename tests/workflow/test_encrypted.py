"""A run that is encrypted is the run that it would be in clear, and leaves no clear text anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.cli.app import app
from postlude.storage import keys, rules
from postlude.workflow.run import run

MARK = "zyxw-marker"
TIMED = ("seconds", "busy", "tokens_per_second", "memory_bytes", "mfu", "loader", "wait")
CLEAR_NAMES = ("KEYS", ".lock")


@pytest.fixture(autouse=True)
def _no_rules() -> Iterator[None]:
    yield
    rules.use(())


def write_manifest(folder: Path, key: str | None) -> str:
    """Supervised, then online, then answers, over records with the mark in them."""
    folder.mkdir(exist_ok=True)
    data = folder.parent / "chats.jsonl"
    if not data.exists():
        turns = [
            [{"role": "user", "content": f"{MARK} {n}+{n}?"}, {"role": "assistant", "content": f"{2 * n} {MARK}"}]
            for n in range(40)
        ]
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    train: dict[str, Any] = {"threads": 1, "data": {"chats": 1.0}, "checkpoint": {"every": 2}}
    manifest = {
        "name": "small",
        "seed": 3,
        "run_dir": str(folder / "runs"),
        "data": {"chats": {"source": {"path": str(data)}, "format": "messages", "filters": ["dedupe"]}},
        "stages": {
            "sft": {
                **train,
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": shape}},
                "tokenizer": {"bytes": True},
                "steps": 6,
                "batch": {"tokens": 256, "block": 256},
            },
            "rl": {
                **train,
                "recipe": "grpo",
                "model": {"from": "sft"},
                "steps": 4,
                "batch": {"tokens": 4096, "block": 128},
                "rollout": {"prompts": 4, "max_tokens": 6},
                "group": 4,
                "reward": [{"function": {"name": "regex", "pattern": "[a-m]"}}],
            },
        },
    }
    if key is not None:
        manifest["storage"] = {str(folder / "runs"): {"encrypt": {"key": key}}}
    path = folder / "small.yaml"
    path.write_text(json.dumps(manifest))
    return str(path)


def kill_on_the_way(manifest: str, until: Path) -> None:
    """Run, and kill with SIGKILL once a path is there."""
    command = [sys.executable, "-m", "postlude", "run", manifest, "--inline"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not until.exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()


def told(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """The metrics and rollouts, without what differs from run to run."""
    folder = f"{run_dir}/small/stages/{stage}"
    lines = [
        *storage.Journal(f"{folder}/metrics.jsonl").read(),
        *storage.Journal(f"{folder}/rollouts/part-00000000.jsonl").read(),
    ]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def weights(run_dir: Path, stage: str) -> bytes:
    return storage.read_bytes(f"{run_dir}/small/stages/{stage}/model/model.safetensors")


def with_mark(folder: Path) -> list[Path]:
    """The files below a folder that hold the mark, or text in which it is written otherwise."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if MARK.encode() in path.read_bytes()]


@pytest.mark.long
@pytest.mark.capability("Encryption at rest of all that a run writes")
def test_an_encrypted_run_that_is_killed_is_bitwise_a_clear_one_and_leaves_no_clear_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = set(os.listdir("/dev/shm"))
    keys.new_key_file(str(tmp_path / "master.key"))
    clear, sealed = tmp_path / "clear" / "runs", tmp_path / "sealed" / "runs"
    assert run(write_manifest(clear.parent, None), [], inline=True) == 0
    manifest = write_manifest(sealed.parent, f"file:{tmp_path / 'master.key'}")
    stages = sealed / "small" / "stages"
    kill_on_the_way(manifest, stages / "sft" / "checkpoints" / "step-00000004" / "COMMITTED")
    kill_on_the_way(manifest, stages / "rl" / "checkpoints" / "step-00000002" / "COMMITTED")
    assert run(manifest, [], inline=True) == 0

    for stage in ("sft", "rl"):
        assert told(sealed, stage) == told(clear, stage)
        assert weights(sealed, stage) == weights(clear, stage)
    assert with_mark(clear)  # so that the search means something
    assert not with_mark(sealed)
    assert not with_mark(scratch)
    left = [Path("/dev/shm", name) for name in set(os.listdir("/dev/shm")) - before if "postlude" in name]
    assert not [path for path in left if with_mark(path)]
    headers = {path: path.read_bytes()[:8] for path in sealed.rglob("*") if path.is_file()}
    headers = {path: begin for path, begin in headers.items() if not path.name.endswith(CLEAR_NAMES)}
    assert set(headers.values()) == {b"\x89PLENC\r\n", b"iVBMRU5D"}

    rules.use(())
    place = ["--storage", manifest]
    for command, words in (
        (["status", str(sealed / "small"), *place], "rl"),
        (["runs", str(sealed), *place], "small"),
        (["verify", str(sealed / "small" / "rl"), "--json", *place], '"not_compared": [],'),
        (["generate", str(sealed / "small" / "rl"), "--prompt", "a", "--max-tokens", "3", *place], ""),
        (["export", str(sealed / "small" / "rl"), str(tmp_path / "out"), *place], "in clear"),
        (["keys", "show", str(sealed / "small"), *place], "runs/small/stages/sft/model:"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(command)
        assert not ended.value.code
        assert words in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights(clear, "rl")
