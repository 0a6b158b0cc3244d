"""Makes what `tests/test_earlier_version.py` goes on with: a run that an earlier version began and that was killed.

    python tests/earlier/make.py CHECKOUT

CHECKOUT is a checkout of that version with a virtual environment `.venv` of its own. Its `postlude` runs
`project.yaml` once undisturbed and once so that every stage but the first is killed with SIGKILL in its middle,
after a checkpoint and past it. Written beside this file: `killed.tar.xz` and `undisturbed.tar.xz`, the run directories
without what a resume has no use for, and `machine.json`, what computed them. A test compares with the numbers in
them, so let the machine be one of the kind that tests run on, and commit the three together.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).parent

RUN = Path("runs/earlier")
"""The run below the folder that holds the project."""

DONE = ("base",)
"""What is finished before anything is killed."""

KILLED = {"sft": 24, "dpo": 24, "student": 24, "grpo": 24, "ppo": 24, "answers": 24}
"""The stages that are killed, with the steps or portions that each has."""

ARGUMENTS = ["-m", "postlude", "run", "project.yaml", "--inline"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

WRITTEN = 1_750_000_000
"""When the data were written, in seconds since 1970."""

ATTEMPTS = 20
"""A stage that was killed too early or too late is begun again."""


def copy_project(folder: Path) -> Path:
    """Fill a new folder with the manifest and its data. Their time stamps are always the same: a stage goes on only
    with data that have not been written again."""
    shutil.copytree(HERE / "data", folder / "data")
    shutil.copy(HERE / "project.yaml", folder)
    for path in (folder / "data").iterdir():
        os.utime(path, (WRITTEN, WRITTEN))
    return folder


def machine() -> dict[str, str]:
    """What the bits of a result hang on: the processor with its instructions, and the versions of what computes."""
    described = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in described.read_text().splitlines()] if described.exists() else []
    processor = {key.strip(): value.strip() for key, _, value in lines}
    instructions = " ".join(sorted(processor.get("flags", "").split()))
    return {
        "processor": processor.get("model name", platform.processor()),
        "instructions": hashlib.sha256(instructions.encode()).hexdigest(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }


def run(python: Path, folder: Path) -> None:
    subprocess.run([python, *ARGUMENTS], cwd=folder, env=ENVIRONMENT, check=True)


def run_and_kill(python: Path, folder: Path, stage: str, steps: int) -> None:
    """Run a stage until it has lost something by being killed: it is past the last checkpoint, and not at its end."""
    place = folder / RUN / "stages" / stage
    for _ in range(ATTEMPTS):
        shutil.rmtree(place, ignore_errors=True)
        process = subprocess.Popen([python, *ARGUMENTS, "--stage", stage], cwd=folder, env=ENVIRONMENT)
        while process.poll() is None and steps_told(place) < steps // 2 + 2:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        committed, told = steps_committed(place), steps_told(place)
        portions = (place / "portions").exists()
        if process.returncode == -signal.SIGKILL and 0 < committed < steps and (portions or committed < told):
            print(f"{stage}: killed with {told} steps told and {committed} committed")
            return
    raise SystemExit(f"{stage}: not killed in its middle in {ATTEMPTS} attempts.")


def steps_told(stage: Path) -> int:
    metrics = stage / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def steps_committed(stage: Path) -> int:
    """Of the newest checkpoint; portions where there are those."""
    portions = len(list(stage.glob("portions/0*.jsonl")))
    return portions or max((int(path.parent.name[5:]) for path in stage.glob("checkpoints/*/COMMITTED")), default=0)


def pack(folder: Path, name: str, left_out: tuple[str, ...]) -> None:
    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if set(left_out) & set(Path(entry.name).parts) else entry

    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz") as archive:
        archive.add(folder / RUN, RUN.as_posix(), filter=keep)
    print(f"{name}.tar.xz: {(HERE / f'{name}.tar.xz').stat().st_size // 1000} kB")


def unpack(name: str, folder: Path) -> Path:
    """The run of an archive, in a folder."""
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / RUN


def main(checkout: str) -> None:
    python = Path(checkout).absolute() / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as shaken:
        run(python, copy_project(Path(calm)))
        copy_project(Path(shaken))
        for stage in DONE:
            subprocess.run([python, *ARGUMENTS, "--stage", stage], cwd=shaken, env=ENVIRONMENT, check=True)
        for stage, steps in KILLED.items():
            run_and_kill(python, Path(shaken), stage, steps)
        pack(Path(calm), "undisturbed", ("checkpoints", "cache"))
        pack(Path(shaken), "killed", ("cache",))
    (HERE / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
