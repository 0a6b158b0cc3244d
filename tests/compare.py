"""Runs the demo with two checkouts on this machine, one after the other, and compares all that comes of it, bit by bit.

    python tests/compare.py OLD NEW [--small] [--inline] [KEY=VALUE ...]

OLD and NEW are checkouts, each with a virtual environment `.venv` of its own; both run the demo of OLD. A change of
structure must leave every number as it is. Exits 1 with the first difference; the two runs are kept then.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from results import artifact_files, read_entries, stage_differences, stages_of

WIDTH = 80

SMALL = (
    "data.exercises.limit=60",
    "data.unseen.limit=40",
    "stages.sft.steps=20",
    "stages.answers.reward=[{function: {name: regex, pattern: '[0-4]'}}]",
    "stages.answers.concurrency=64",
    "stages.judge.epochs=1",
    "stages.rl.steps=6",
    "stages.rl.reward=[{function: {name: regex, pattern: '[0-4]'}}, {model: {from: judge}, weight: 0.05}]",
    "stages.student.steps=20",
)
"""A demo that learns nothing, in a tenth of the time."""


def run_demo(checkout: Path, manifest: Path, folder: Path, arguments: Sequence[str]) -> Path:
    """Run the manifest with a checkout, in a new folder; the directory of the run."""
    folder.mkdir()
    command = [checkout / ".venv" / "bin" / "python", "-m", "postlude", "run", manifest, *arguments]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{checkout}: exit code {done.returncode}")
    print(f"{folder.name}: {time.monotonic() - begin:.0f} s with {checkout}")
    return folder / "build" / "runs" / "demo"


def compare(before: Path, after: Path) -> str | None:
    """Print what is compared, a line for each stage; the first difference, if there is one."""
    columns = ("metrics", "losses by example", "rollouts", "evaluations")
    print(f"\n{'stage':10}{'metrics':>9}{'losses':>9}{'rollouts':>10}{'evaluations':>13}{'files':>7}{'bytes':>12}")
    first = None
    if stages_of(before) != stages_of(after):
        first = f"stages: {', '.join(stages_of(before))} in the first, {', '.join(stages_of(after))} in the second"
    for stage in stages_of(before):
        entries, files = read_entries(before, stage), artifact_files(before, stage)
        counts = [len(entries[column]) for column in columns]
        size = sum(path.stat().st_size for path in files.values())
        found = list(islice(stage_differences(before, after, stage), 1))
        numbers = "{:9,}{:9,}{:10,}{:13,}".format(*counts) + f"{len(files):7,}{size:12,}"
        print(f"{stage:10}{numbers}  {'differs' if found else 'same'}")
        first = first or next((f"{stage}: {difference}" for difference in found), None)
    return first


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--small", action="store_true", help="a demo that learns nothing, in a tenth of the time")
    parser.add_argument("--inline", action="store_true", help="all stages in one process")
    asked = parser.parse_intermixed_args()
    arguments = [*(SMALL if asked.small else ()), *asked.overrides, *(["--inline"] if asked.inline else [])]
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    manifest = asked.old.absolute() / "examples" / "demo.yaml"
    before, after = (
        run_demo(checkout.absolute(), manifest, folder / name, arguments)
        for name, checkout in (("old", asked.old), ("new", asked.new))
    )
    difference = compare(before, after)
    if difference is not None:
        print("\n" + textwrap.fill(f"The first difference: {difference}", WIDTH))
        print(f"Both runs are in {folder}")
        return 1
    print("\nEvery bit is the same.")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
