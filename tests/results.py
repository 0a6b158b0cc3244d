"""What a run came to, read from its directory by names of files alone, and where two runs differ.

Nothing of the package is used, for the two may be of different versions. Left out is what differs from run to run:
times, rates, memory, what a lineage says of versions and of the times of files, and the order of an adapter's targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from safetensors.torch import load_file

TIMED = ("seconds", "busy", "tokens_per_second", "memory_bytes", "mfu")
"""How the names of those metrics begin that differ from run to run."""

DIGESTS = "COMMITTED"
"""The file of an artifact that says nothing but what its other files hold."""

VARYING = ("lineage.json", "adapter_config.json")
"""The files of an artifact that may be other bytes and still say the same."""


def stages_of(run: Path) -> list[str]:
    """The stages that have begun, in the order in which they did."""
    states = {path.parent.name: json.loads(path.read_text()) for path in (run / "stages").glob("*/state.json")}
    return sorted(states, key=lambda stage: (states[stage]["begun_at"], stage))


def read_lines(path: Path) -> list[Any]:
    """The entries of a file of JSON lines; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_metrics(stage: Path) -> list[dict[str, Any]]:
    """A stage's lines of metrics, without what differs from run to run."""
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMED)}
        for line in read_lines(stage / "metrics.jsonl")
    ]


def read_entries(run: Path, stage: str) -> dict[str, list[dict[str, Any]]]:
    """What a stage told while it was at work, by what it is, in the order of steps."""
    folder = run / "stages" / stage
    losses = [row for part in folder.glob("examples/*.parquet") for row in parquet.read_table(part).to_pylist()]
    found = {}
    for event in read_lines(run / "events.jsonl"):
        if event["kind"] == "evaluation" and event["stage"] == stage:
            found[event["step"], event["name"]] = {**event, "time": None}  # a resume may find it again
    return {
        "metrics": read_metrics(folder),
        "losses by example": sorted(losses, key=lambda row: [row[key] for key in ("step", "epoch", "example_id")]),
        "rollouts": [line for part in sorted(folder.glob("rollouts/*.jsonl")) for line in read_lines(part)],
        "evaluations": [found[key] for key in sorted(found)],
    }


def artifact_files(run: Path, stage: str) -> dict[str, Path]:
    """The files of a stage's artifact by their paths in it."""
    folder = run / "stages" / stage / "model"
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def stage_differences(before: Path, after: Path, stage: str, tolerance: float = 0.0) -> Iterator[str]:
    """Where a stage of two runs differs, one line for each place.

    With a ``tolerance``, absolute or relative, fractions and weights may differ by it, and files by what follows from
    that; without one every bit counts.
    """
    yield from differences(read_entries(before, stage), read_entries(after, stage), tolerance)
    files, others = artifact_files(before, stage), artifact_files(after, stage)
    yield from differences(dict.fromkeys(files), dict.fromkeys(others), place="model")
    for name in files:
        if name in others:
            yield from file_differences(files[name], others[name], tolerance, f"model/{name}")


def file_differences(before: Path, after: Path, tolerance: float, place: str) -> Iterator[str]:
    if before.read_bytes() == after.read_bytes():
        return
    content = list(differences(read_file(before), read_file(after), tolerance, place))
    yield from content
    if not content and not tolerance and before.name not in VARYING:
        yield f"{place} says the same in other bytes"


def read_file(path: Path) -> Any:
    """The content of a file, in the parts by which a difference can be told."""
    match path.suffix:
        case ".safetensors":
            return load_file(path)
        case ".jsonl":
            return read_lines(path)
        case ".json":
            content = json.loads(path.read_text())
            if path.name == "lineage.json":
                parents = [{**parent, "artifact_sha256": None} for parent in content["parents"]]
                return {
                    **content,
                    "versions": None,
                    "manifest_sha256": None,
                    "parents": parents,
                    "data": dict.fromkeys(content["data"]),
                    "base": None,
                    "stop_ids": None,
                }
            if path.name == "adapter_config.json":
                base = Path(content["base_model_name_or_path"]).name  # absolute, and each run has its own folder
                return {
                    **content,
                    "base_model_name_or_path": base,
                    "target_modules": sorted(content["target_modules"]),
                }
            return content
    return path.read_bytes()


def differences(before: Any, after: Any, tolerance: float = 0.0, place: str = "") -> Iterator[str]:
    """Where two values differ, one line for each place."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            at = f"{place}: {key}" if place else str(key)
            if tolerance and key.endswith("clip_share"):
                continue  # rounding takes one of few tokens across the border
            if key in before and key in after:
                yield from differences(before[key], after[key], tolerance, at)
            else:
                yield f"{at} is only in the {'first' if key in before else 'second'}"
    elif isinstance(before, list) and isinstance(after, list):
        for number, (left, right) in enumerate(zip(before, after), 1):
            yield from differences(left, right, tolerance, f"{place}, entry {number}")
        if len(before) != len(after):
            yield f"{place}: {len(before)} entries in the first, {len(after)} in the second"
    elif isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        yield from tensor_differences(before, after, tolerance, place)
    elif not same(before, after, tolerance):
        yield f"{place}: {before!r} in the first, {after!r} in the second"


def tensor_differences(before: torch.Tensor, after: torch.Tensor, tolerance: float, place: str) -> Iterator[str]:
    if before.dtype != after.dtype or before.shape != after.shape:
        sizes = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (before, after)]
        yield f"{place}: {sizes[0]} in the first, {sizes[1]} in the second"
        return
    bits = [tensor.flatten().view(torch.uint8) for tensor in (before, after)]
    gap = (before.double() - after.double()).abs()
    if not (torch.equal(*bits) or (tolerance and bool((gap <= tolerance * before.abs().clamp(min=1)).all()))):
        yield f"{place}: {int((gap != 0).sum())} of {gap.numel()} numbers differ, by up to {gap.max():.1e}"


def same(before: Any, after: Any, tolerance: float) -> bool:
    if tolerance and isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=tolerance, abs_tol=tolerance)
    return type(before) is type(after) and repr(before) == repr(after)
