"""Inputs that once went wrong: each folder beside the real data has a small one, and a script that tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
RIGHT, FAULT = 0, 1
NOT_YET = {"hardening-cut-cache-index-is-believed", "hardening-damaged-small-files-end-in-tracebacks"}
"""Files that are read again are not all guarded against damage."""


@pytest.mark.long
@pytest.mark.parametrize("case", sorted(path.parent.name for path in CASES.glob("*/run.sh")))
def test_what_once_went_wrong_is_right_or_refused(case: str, shared_data: Path) -> None:
    if case in NOT_YET:
        pytest.skip("this kind of damage is not guarded against yet")
    command = Path(sys.executable).parent / "postlude"
    environment = {**os.environ, "POSTLUDE": str(command), "DATA": str(shared_data)}
    done = subprocess.run([str(CASES / case / "run.sh")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (RIGHT, FAULT), f"the case could not run:\n{done.stdout}{done.stderr}"
    assert done.returncode == RIGHT, done.stdout + done.stderr
