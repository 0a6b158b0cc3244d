"""A writer that is killed between any two requests to an object store: what it wrote is whole, and the next goes on.

The proxy kills the process in the place of passing on its request number n: for every sixth n, or for every one with
POSTLUDE_TEST_KILLS=all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import pytest

from postlude import storage
from postlude.storage import journal
from store_proxy import PASS, Proxy, Request

STRIDE = 1 if os.environ.get("POSTLUDE_TEST_KILLS") == "all" else 6
STEPS, FILES = 1, {"weights": b"many", "state/0": b"zero"}


def work(run: str) -> None:
    """What a stage does: for each step a line of metrics, and a checkpoint, which a status names. Goes on where what
    stands there ends."""
    with storage.lock(f"{run}/run.lock", guarded_folder=run):
        done = last_step(run)
        metrics = storage.Journal(f"{run}/metrics.jsonl")
        metrics.cut(lambda line: line["step"] <= done)
        for step in range(done + 1, STEPS + 1):
            metrics.append({"step": step}, sync=True)
            folder = f"{run}/step-{step}"
            storage.begin(folder)
            digests = {}
            for name, content in FILES.items():
                with storage.open_hashed(f"{folder}/{name}") as file:
                    file.write(bytes([step]) + content)
                digests[name] = file.digest
            storage.commit(folder, digests, {"step": step})
            storage.write_document(f"{run}/state.json", {"step": step})


def last_step(run: str) -> int:
    """That of the newest checkpoint, every byte of which is read."""
    names = [name for name in storage.list_directory(run) if name.startswith("step-")]
    committed = [f"{run}/{name}" for name in names if storage.is_committed(f"{run}/{name}")]
    return max((storage.verify(uri).extra["step"] for uri in committed), default=0)


def check(run: str) -> int:
    """The last step of what stands there, which is whole."""
    done = last_step(run)
    steps = [line["step"] for line in storage.Journal(f"{run}/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= done
    if storage.exists(f"{run}/state.json"):
        assert done - 1 <= storage.read_document(f"{run}/state.json")["step"] <= done
    return done


@pytest.mark.long
@pytest.mark.capability("Killed between any two requests to an object store, a run is whole and goes on")
def test_a_writer_killed_at_any_request_leaves_what_is_whole(
    bucket: str, proxy: Proxy, start: Callable[..., BaseProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "PUT_SECONDS", 0.0)
    number, seen = 1 - STRIDE, []
    while True:
        number, run = number + STRIDE, f"s3://{bucket}/run-{number}"
        writers: list[BaseProcess] = []

        def judge(request: Request, number: int = number, writers: list[BaseProcess] = writers) -> object:
            if request.number != number:
                return PASS
            os.kill(writers[0].pid or 0, signal.SIGKILL)
            return 500, "InternalError"

        proxy.reset(judge)
        writers.append(start(work, run))
        writers[0].join()
        if writers[0].exitcode == 0:  # it makes no more requests than that
            break
        assert writers[0].exitcode == -signal.SIGKILL
        proxy.reset()
        done = check(run)
        assert done >= max(seen, default=0)
        seen.append(done)
        work(run)
        assert check(run) == STEPS
    assert set(seen) == {0, STEPS}
    assert number > 30
