"""Fixtures that every test may use, and one place that keeps the tests to the cores they are given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from postlude.errors import ComputeError
from postlude.manifest.component import lookup
from postlude.rollout.serving.server import EngineChoice
from postlude.telemetry import openmp
from postlude.telemetry.recorder import Recorder

pytest_plugins = ["object_store", "roles", "schedule", "status"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # what stands beside is another test, which must not be waited for
openmp.wait_shortly()

# Nothing about time is asserted in a test. A developer's runs explore; one that gates a change repeats.
settings.register_profile("postlude", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("postlude")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("POSTLUDE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set POSTLUDE_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def vllm() -> EngineChoice:
    """The engine ``vllm`` without compiling, which takes most of its start; the test is skipped where its environment
    was not made, except where a change is judged. One test has it compile, as it does by itself."""
    choice = lookup("engines", "vllm")(options={"enforce-eager": True})
    assert isinstance(choice, EngineChoice)
    try:
        choice.check()
    except ComputeError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
    return choice


@contextmanager
def _after_step(number: int, do: Callable[[], object]) -> Iterator[None]:
    def metrics(recorder: Recorder, line: Mapping[str, Any]) -> None:
        told(recorder, line)
        if line["step"] == number:
            do()

    told = Recorder.metrics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "metrics", metrics)
        yield


@pytest.fixture
def after_step() -> Callable[[int, Callable[[], object]], AbstractContextManager[None]]:
    """Has something done in the block when a stage that runs in this process has told of a step."""
    return _after_step
