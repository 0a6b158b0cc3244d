"""Runs to work on, behind a local path and a remote URI."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from postlude.runs import Run


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a folder for runs."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def run(place: str) -> Run:
    """A run that has begun."""
    run = Run(f"{place}/assistant")
    run.write_manifest_lock("name: assistant\n")
    return run
