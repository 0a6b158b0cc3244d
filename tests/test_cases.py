"""Inputs that once went wrong: each folder beside the real data has a small one, and a script that tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
RIGHT, FAULT = 0, 1


@pytest.mark.long
@pytest.mark.parametrize("case", sorted(path.parent.name for path in CASES.glob("*/run.sh")))
def test_what_once_went_wrong_is_right_or_refused(case: str, shared_data: Path) -> None:
    command = Path(sys.executable).parent / "postlude"
    environment = {**os.environ, "POSTLUDE": str(command), "DATA": str(shared_data)}
    done = subprocess.run([str(CASES / case / "run.sh")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (RIGHT, FAULT), f"the case could not run:\n{done.stdout}{done.stderr}"
    assert done.returncode == RIGHT, done.stdout + done.stderr
