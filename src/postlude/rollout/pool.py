"""Rewards that are computed beside the work: in processes of their own, with a deadline for each sample.

A function that hangs is killed with its process, one that raises, returns no number or takes its process down is told;
either way its sample has no reward, and the others have theirs.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import TimeoutError as OverTime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool

from postlude.rollout.reward import RewardFunction, call

if TYPE_CHECKING:  # the processes of the pool need no torch
    from postlude.rollout.prompts import Prompt


@dataclass(frozen=True)
class Unscored:
    """Why a sample has no reward."""

    reason: str
    """In words that are the same for many samples."""
    detail: str
    """With the record and the place."""


class RewardPool:
    """Calls reward functions in ``workers`` processes. ``seconds`` is how long one call may take.

    A context manager: on leaving, no process is left.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        self._seconds = seconds
        self._pool = ProcessPool(
            max_workers=workers,
            context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=[os.getpid()],
        )

    def score(
        self, function: RewardFunction, name: str, completions: Sequence[tuple[Prompt, str]]
    ) -> list[float | Unscored]:
        """The function's reward of each completion of a prompt, or why there is none."""
        futures: list[Any] = [
            self._pool.schedule(
                call,
                args=(function, name, prompt.example_id, prompt.asked, text, dict(prompt.rewarded_record)),
                timeout=self._seconds,
            )
            for prompt, text in completions
        ]
        return [self._result(future, name, prompt) for future, (prompt, _) in zip(futures, completions, strict=True)]

    def _result(self, future: Any, name: str, prompt: Prompt) -> float | Unscored:
        at = f"at the record '{prompt.example_id}'"
        try:
            return future.result()
        except OverTime:
            late = f"the reward '{name}' took longer than {self._seconds:g} seconds"
            return Unscored(late, f"{late} {at}")
        except ProcessExpired as error:
            died = f"the reward '{name}' ended its process"
            return Unscored(died, f"{died} {at} (exit code {error.exitcode})")
        except Exception as error:  # somebody else's code: whatever it raises is told with the record that it met
            return Unscored(f"the reward '{name}' failed", str(error))

    def close(self) -> None:
        """Kill what is at work, and wait until it is gone."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _begin(parent: int) -> None:
    """Die with the parent, however it dies; leave interrupts to it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
