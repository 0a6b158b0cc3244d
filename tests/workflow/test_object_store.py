"""A run whose directory, data and base model are on an object store is the run of local files, killed or not."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from object_store import ObjectStore
from postlude import storage
from postlude.runs import Run
from results import stage_differences
from stages.conftest import write_random_model
from workflow.test_two_controllers import Controller

AWS = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
STEPS = {"sft": 12, "rl": 6}


def write_sources(folder: Path) -> None:
    """A model of a few thousand weights, and data of two kinds."""
    write_random_model(folder / "base", 1)
    chance = random.Random(0)
    rows = [(f"{n}: {chance.randrange(10**6)}", str(chance.randrange(10**6))) for n in range(400)]
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats[:200]))
    table = pa.Table.from_pylist([{"messages": chat} for chat in chats[200:]])
    parquet.write_table(table, folder / "chats.parquet", row_group_size=20)


def manifest(place: str, path: Path) -> Path:
    """The manifest of a run that has everything at a place."""
    common = {"threads": 1, "optimizer": {"name": "adamw", "lr": 1e-2}, "checkpoint": {"every": 2}}
    query = "SELECT messages FROM chats WHERE length(messages[1].content) > 6"
    tree = {
        "name": "far",
        "seed": 3,
        "run_dir": f"{place}/runs",
        "data": {
            "chats": {"source": {"path": f"{place}/chats.*", "stream": True}, "format": "messages"},
            "asked": {
                "source": {"query": query, "tables": {"chats": f"{place}/chats.parquet"}},
                "format": "messages",
            },
        },
        "stages": {
            "sft": {
                "recipe": "sft",
                "model": {"path": f"{place}/base"},
                "data": {"chats": 1.0},
                "steps": STEPS["sft"],
                "batch": {"tokens": 1024, "block": 256},
                **common,
            },
            "rl": {
                "recipe": "grpo",
                "model": {"from": "sft"},
                "data": {"asked": 1.0},
                "steps": STEPS["rl"],
                "batch": {"tokens": 2048, "block": 128},
                "rollout": {"prompts": 4, "max_tokens": 6},
                "group": 4,
                "reward": [{"function": {"name": "regex", "pattern": "[a-m]"}}],
                **common,
            },
        },
    }
    path.write_text(json.dumps(tree))
    return path


def upload(folder: Path, bucket: str, object_store: ObjectStore) -> str:
    client = object_store.client()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), bucket, f"all/{path.relative_to(folder)}")
    return f"s3://{bucket}/all"


def download(bucket: str, object_store: ObjectStore, folder: Path) -> Path:
    """The run as it stands in a local directory, with each journal one file."""
    client, segments = object_store.client(), re.compile(r"(.*\.jsonl)/\d{8}\.jsonl")
    for key in sorted(object_store.keys(bucket)):
        if key.startswith("all/runs/"):
            match = segments.fullmatch(key)
            path = folder / (match[1] if match else key).removeprefix("all/runs/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return folder / "far"


@pytest.fixture
def far(tmp_path: Path, bucket: str, object_store: ObjectStore) -> Iterator[Callable[..., Controller]]:
    """Starts ``postlude`` with arguments, with everything in the bucket."""
    (tmp_path / "sources").mkdir()
    write_sources(tmp_path / "sources")
    upload(tmp_path / "sources", bucket, object_store)
    manifest(f"s3://{bucket}/all", tmp_path / "far.yaml")
    manifest(str(tmp_path / "sources"), tmp_path / "near.yaml")
    started: list[Controller] = []

    def start(*arguments: str, **settings: float) -> Controller:
        prepare = partial(_prepare, {name: os.environ[name] for name in AWS}, settings)
        started.append(Controller(tmp_path, *arguments, prepare=prepare))
        return started[-1]

    yield start
    for controller in started:
        controller.process.kill()
        controller.process.join()


def _prepare(environment: dict[str, str], settings: dict[str, float]) -> None:
    from postlude.storage import leases

    os.environ.update(environment)
    for name, value in settings.items():
        setattr(leases, name, value)


def steps_done(run: Run) -> int:
    return sum(len(run.stage(stage).metrics.read()) for stage in STEPS)


def kill(controller: Controller) -> None:
    assert controller.process.pid is not None
    os.killpg(controller.process.pid, signal.SIGKILL)
    controller.process.join()


@pytest.mark.long
@pytest.mark.capability("A run on an object store, killed again and again, is bitwise the run of local files")
def test_a_run_on_an_object_store_is_the_run_of_local_files(
    far: Callable[..., Controller], tmp_path: Path, bucket: str, object_store: ObjectStore
) -> None:
    near, chance = far("run", "near.yaml", "--inline"), random.Random(1)
    run, kills = Run(f"s3://{bucket}/all/runs/far"), 0
    while True:
        controller, known = far("run", "far.yaml", "--inline"), steps_done(run)
        aim = known + chance.randrange(1, 5)
        while kills < 4 and controller.process.is_alive() and not known - 3 < aim <= steps_done(run):
            time.sleep(0.02)
        if kills == 4 or not controller.process.is_alive():
            break
        time.sleep(chance.random() * 0.2)
        kill(controller)
        kills += 1
    code, said = controller.ended()
    assert code == 0, said
    assert near.ended()[0] == 0
    assert kills > 2
    copy = download(bucket, object_store, tmp_path / "copy")
    for stage, steps in STEPS.items():
        assert run.stage(stage).status().state == "done"
        assert len(run.stage(stage).metrics.read()) == steps
        differences = stage_differences(tmp_path / "sources" / "runs" / "far", copy, stage)
        assert [line for line in differences if not line.startswith("model/lineage.json")] == []  # names its places
    assert object_store.uploads(bucket) == []


def await_step(run: Run, step: int, controller: Controller) -> None:
    while steps_done(run) < step:
        assert controller.process.is_alive(), controller.ended()
        time.sleep(0.05)


def await_lease(run: Run, controller: Controller) -> None:
    while (holder := storage.holder(f"{run.uri}/run.lock")) is None or holder.pid != controller.process.pid:
        assert controller.process.is_alive(), controller.ended()
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.capability("A controller that was stopped past its lease cannot commit over its successor")
def test_of_two_controllers_one_writes(far: Callable[..., Controller], bucket: str) -> None:
    short = {"LEASE_SECONDS": 6.0, "BELIEVED_SECONDS": 4.0, "HEARTBEAT_SECONDS": 0.5, "WATCH_SECONDS": 0.2}
    run = Run(f"s3://{bucket}/all/runs/far")
    both = [far("run", "far.yaml", "--inline", **short) for _ in range(2)]
    while all(controller.process.is_alive() for controller in both):
        time.sleep(0.02)
    held_up, refused = sorted(both, key=lambda controller: controller.process.is_alive(), reverse=True)
    code, said = refused.ended()
    assert code == 1
    assert "is in use by" in said
    assert held_up.process.pid is not None
    os.killpg(held_up.process.pid, signal.SIGSTOP)
    known = steps_done(run)
    assert known < sum(STEPS.values())
    successor = far("run", "far.yaml", "--inline", **short)
    await_step(run, max(known, 2), successor)
    await_lease(run, successor)
    os.killpg(held_up.process.pid, signal.SIGCONT)
    code, said = held_up.ended()
    assert code != 0
    assert "no longer this process's" in said
    code, said = successor.ended()
    assert code == 0, said
    for stage, steps in STEPS.items():
        assert [line["step"] for line in run.stage(stage).metrics.read()] == list(range(1, steps + 1))
        storage.verify(run.stage(stage).artifact)
