"""What a user can get wrong, from the command's side: a clear error that names the place, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from postlude import storage
from postlude.errors import DataError, UserError
from postlude.manifest.problem import ManifestError
from postlude.runs import Run
from postlude.training.trainer import Diverged
from postlude.workflow.run import run
from postlude.workflow.validate import validate

pytestmark = pytest.mark.capability("Bad input gets a clear error and loses nothing")

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(count)
    ]


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    """A manifest that runs in a second; a test breaks one thing in it."""
    write_lines(tmp_path / "chats.jsonl", conversations(24))
    return {
        "name": "bad",
        "run_dir": str(tmp_path / "runs"),
        "data": {"chats": {"source": {"path": str(tmp_path / "chats.jsonl")}, "format": "messages"}},
        "stages": {
            "sft": {
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": dict(SHAPE)}},
                "tokenizer": {"bytes": True},
                "data": {"chats": 1.0},
                "steps": 4,
                "batch": {"tokens": 512, "block": 256},
                "threads": 1,
                "checkpoint": {"every": 1, "keep": 3},
            }
        },
    }


@pytest.fixture
def start(tmp_path: Path) -> Callable[[dict[str, Any]], int]:
    """Runs a manifest in this process."""

    def start(manifest: dict[str, Any]) -> int:
        path = tmp_path / "bad.yaml"
        path.write_text(json.dumps(manifest, indent=1))
        return run(str(path), [], inline=True)

    return start


def change(manifest: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(manifest)
    *above, last = place.split(".")
    part = changed
    for key in above:
        part = part[key]
    part[last] = value
    return changed


# --- the manifest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("stages.sft.optimiser", {"name": "adamw"}, "optimizer"),
        ("stages.sft.steps", "four", "steps"),
        ("stages.sft.optimizer", {"name": "adamw", "rate": 1}, "rate"),
        ("defaults", {"betta": 1}, "betta"),
        ("data.spare", {"source": {"path": "x.jsonl"}, "format": "messages"}, "no stage uses"),
        ("stages.sft.model.new.config", {**SHAPE, "num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("stages.sft.model", {"path": "/no/such/model"}, "/no/such/model"),
        ("stages.sft.model.new.architecture", "lama", "llama"),
        ("stages.sft.model.new.config.vocab_size", 32, "vocabulary of 32"),
        ("data.chats.template", "/no/such/template.jinja", "/no/such/template.jinja"),
        ("data.chats.template", "{% for m in messages %}{{ m", "line 1"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_with_its_place(manifest, tmp_path, place, value, said) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(change(manifest, place, value), indent=1))
    report = validate(str(path), [])
    assert isinstance(report.error, ManifestError)
    assert report.exit_code == 2
    assert said in str(report.error)


def test_an_unknown_key_is_told_with_line_column_and_the_nearest_name(manifest, tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(change(manifest, "stages.sft.stpes", 3), indent=1))
    place = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if "stpes" in line)
    error = validate(str(path), []).error
    assert f"{path}:{place}:4: stages.sft.stpes" in str(error)
    assert "'steps'" in str(error)


def test_a_tokenizer_without_a_template_is_refused_for_chats(manifest, start, shared_data) -> None:
    broken = change(manifest, "stages.sft.tokenizer", {"path": str(shared_data / "models" / "stories260K_hf")})
    with pytest.raises(UserError, match=r"data\.\w+\.template"):
        start(broken)


# --- the data -----------------------------------------------------------------------------------------------


def first_error(manifest: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(manifest, indent=1))
    report = validate(str(path), [])
    assert isinstance(report.error, DataError), report.error
    assert report.exit_code == 3
    return str(report.error)


def test_a_missing_file_is_named_with_the_nearest(manifest, tmp_path) -> None:
    said = first_error(change(manifest, "data.chats.source.path", str(tmp_path / "chat.jsonl")), tmp_path)
    assert "chat.jsonl" in said
    assert "chats.jsonl" in said


def test_an_empty_data_set(manifest, tmp_path) -> None:
    (tmp_path / "chats.jsonl").write_text("")
    assert "chats.jsonl" in first_error(manifest, tmp_path)


@pytest.mark.parametrize(
    "line", [b'{"messages": [}', b'{"messages": "\xff\xfe"}', b'{"messages": [{"role": "assistant", "content": "x"}]}']
)
def test_a_broken_record_is_named_by_file_and_line_or_skipped(manifest, tmp_path, start, line: bytes) -> None:
    path = tmp_path / "chats.jsonl"
    lines = path.read_bytes().splitlines()
    lines[6] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    said = first_error(manifest, tmp_path)
    assert "chats.jsonl" in said
    assert "line 7" in said
    assert "on_bad_record" in said
    assert start(change(manifest, "data.chats.on_bad_record", "skip")) == 0


def test_nothing_to_train_on_says_why(manifest, tmp_path) -> None:
    write_lines(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "Hello?"}]}] * 3)
    assert "nothing to train on" in first_error(manifest, tmp_path)


def test_what_is_left_out_is_counted_and_the_rest_is_trained_on(manifest, tmp_path) -> None:
    question = {"messages": [{"role": "user", "content": "Hello?"}]}
    write_lines(tmp_path / "chats.jsonl", [question, *conversations(8), {"messages": "none"}, {"other": 1}])
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(change(manifest, "data.chats.on_bad_record", "skip")))
    report = validate(str(path), [])
    assert report.error is None
    source = report.to_json()["stages"][0]["data"]["sources"]["chats"]
    assert (source["records"], source["read"], source["units"]) == (11, 11, 8)
    assert {reason: dropped["count"] for reason, dropped in source["dropped"].items()} == {"nothing to train on": 1}
    assert [dropped["count"] for dropped in source["filtered"].values()] == [2]


def test_a_block_shorter_than_every_example_says_so(manifest, tmp_path) -> None:
    small = change(manifest, "stages.sft.batch", {"tokens": 16, "block": 8})
    said = first_error(change(small, "data.chats.truncate", "drop"), tmp_path)
    assert "block" in said
    assert "8 tokens" in said


def test_a_template_that_raises_is_named(manifest, tmp_path) -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('two is too many') }}{% endif %}"
    said = first_error(change(manifest, "data.chats.template", template), tmp_path)
    assert "two is too many" in said
    assert "template given in the manifest" in said
    assert "'chats:" in said, "the example"


def test_roles_out_of_order_are_told_by_message(manifest, tmp_path) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]
    write_lines(tmp_path / "chats.jsonl", [*conversations(3), {"messages": messages}])
    said = first_error(manifest, tmp_path)
    assert "line 4" in said
    assert "message 2" in said


def test_before_the_first_step_there_is_nothing_to_lose_and_the_manifest_may_be_mended(manifest, start) -> None:
    with pytest.raises(DataError, match="8 tokens"):
        start(change(change(manifest, "stages.sft.batch", {"tokens": 16, "block": 8}), "data.chats.truncate", "drop"))
    assert start(manifest) == 0


@pytest.mark.parametrize(("place", "value", "code"), [("stages.sft.stpes", 3, 2), ("data.chats.key", "number", 3)])
def test_the_command_exits_with_the_kind_of_error(project, place: str, value: Any, code: int) -> None:
    project.manifest = change(project.manifest, place, value)
    ran, validated = project("run", "MANIFEST"), project("validate", "MANIFEST", "--json")
    assert ran.exit_code == validated.exit_code == code
    assert "\nError: " in f"\n{ran.err}"
    assert "Traceback" not in ran.err
    assert validated.json["error"]["message"] in ran.err


# --- the run ------------------------------------------------------------------------------------------------


def test_a_changed_manifest_is_refused_with_its_difference(manifest, start, tmp_path) -> None:
    assert start(manifest) == 0
    Run(str(tmp_path / "runs" / "bad")).stage("sft").enter("interrupted")
    with pytest.raises(ManifestError, match=r"(?m)^  stages\.sft\.steps: 4 -> 5$"):
        start(change(manifest, "stages.sft.steps", 5))
    assert start(change(manifest, "stages.sft.checkpoint.every", 2)) == 0, "when to save is free"


def test_a_second_process_on_a_run_is_refused(manifest, start, tmp_path) -> None:
    with Run(str(tmp_path / "runs" / "bad")).hold(), pytest.raises(storage.LockedError, match=str(os.getpid())):
        start(manifest)


def test_a_run_that_diverges_names_its_examples_and_keeps_its_checkpoint(manifest, start, tmp_path) -> None:
    wild = change(manifest, "stages.sft.optimizer", {"name": "sgd", "lr": 1e38})
    wild = change(change(wild, "stages.sft.max_grad_norm", None), "stages.sft.max_skipped_steps", 2)
    with pytest.raises(Diverged, match=r"chats:[0-9a-f]{16}") as raised:
        start(change(wild, "stages.sft.steps", 40))
    stage = Run(str(tmp_path / "runs" / "bad")).stage("sft")
    assert stage.status().state == "failed"
    skipped = [line["skipped"] for line in stage.metrics.read()]
    assert skipped[-2:] == [True, True]
    good = skipped.index(True)
    assert stage.checkpoints()[0].step == good, "nothing is saved while steps are skipped"
    assert f"checkpoint of step {good}" in str(raised.value)
    assert '"failure"' in (tmp_path / "runs" / "bad" / "events.jsonl").read_text()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(manifest, start, tmp_path) -> None:
    calm = change(manifest, "run_dir", str(tmp_path / "calm"))
    assert start(calm) == 0
    stage = Run(str(tmp_path / "runs" / "bad")).stage("sft")
    assert start(manifest) == 0
    stage.enter("interrupted")
    newest, before, *_ = stage.checkpoints()
    damaged = next(Path(newest.uri).glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert start(manifest) == 0
    events = (tmp_path / "runs" / "bad" / "events.jsonl").read_text()
    assert "checkpoint_skipped" in events
    assert f'"from_step":{before.step}' in events.replace(" ", "")
    told = [json.loads(line) for line in (Path(stage.uri) / "metrics.jsonl").read_text().splitlines()]
    expected = (tmp_path / "calm/bad/stages/sft/metrics.jsonl").read_text().splitlines()
    assert [line["loss"] for line in told] == [json.loads(line)["loss"] for line in expected]


# --- the disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def crowded(manifest, start, small_disk: Path) -> tuple[dict[str, Any], Path]:
    """A manifest whose run has room for about one and a half checkpoints, and the file that takes the rest."""
    manifest = change(manifest, "run_dir", str(small_disk))
    manifest["stages"]["sft"] |= {"steps": 3, "checkpoint": {"every": 1, "keep": 1}}
    assert start(change(manifest, "name", "measure")) == 0
    checkpoint = next((small_disk / "measure/stages/sft/checkpoints").iterdir())
    needed = sum(file.stat().st_size for file in checkpoint.iterdir())
    subprocess.run(["rm", "-r", small_disk / "measure"], check=True)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**20 - int(1.7 * needed) - 64 * 2**10))
    return manifest, ballast


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(crowded, start, small_disk: Path) -> None:
    manifest, ballast = crowded
    with pytest.raises(storage.StorageFull, match="room"):
        start(manifest)
    stage = Run(str(small_disk / "bad")).stage("sft")
    (kept,) = stage.checkpoints()
    storage.verify(kept.uri)
    assert not (Path(kept.uri).parent / f"step-{kept.step + 1:08d}").exists()
    ballast.unlink()
    assert start(manifest) == 0, "with room again it goes on"
    lines = (Path(stage.uri) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_full_disk_is_an_alarm_where_the_run_is_to_go_on(crowded, start, small_disk: Path) -> None:
    manifest, _ = crowded
    manifest["stages"]["sft"]["checkpoint"]["on_full_disk"] = "continue"
    with suppress(storage.StorageFull):  # the artifact itself may not fit
        start(manifest)
    lines = (small_disk / "bad/stages/sft/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "checkpoint not saved" in (small_disk / "bad/events.jsonl").read_text()


def fill(path: Path) -> None:
    """Fill the disk to its last byte, as another program might."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def test_a_disk_without_room_for_one_line_stops_the_run_and_loses_nothing(
    manifest, start, small_disk: Path, after_step
) -> None:
    assert start(change(manifest, "name", "calm")) == 0
    expected = (Path(manifest["run_dir"]) / "calm/stages/sft/metrics.jsonl").read_text().splitlines()
    manifest = change(change(manifest, "run_dir", str(small_disk)), "stages.sft.checkpoint.keep", 1)
    flood = small_disk / "flood"
    with pytest.raises(storage.StorageFull, match="room"), after_step(2, lambda: fill(flood)):
        start(manifest)
    flood.unlink()
    assert start(manifest) == 0
    lines = (small_disk / "bad/stages/sft/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [json.loads(line)["loss"] for line in expected]


def test_a_read_only_run_directory_is_named(manifest, start, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(storage.NotWritable, match=str(small_disk)):
        start(change(manifest, "run_dir", str(small_disk / "runs")))
