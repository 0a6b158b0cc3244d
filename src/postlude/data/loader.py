"""The exact loader: the blocks of each optimiser step, dealt to ranks; a stop leaves no trace in them.

Notable:

- The blocks of the windows, end to end, are one sequence. A step takes the next ``blocks_per_step`` of it, across
  windows but never across the end of an epoch: the last step of an epoch takes what is left. So a step holds no
  example twice, and its epoch is one number.
- Every rank makes the whole sequence and keeps its share of each step, so the content of a step does not depend on
  the number of ranks. Blocks are dealt in turn, with empty ones where they do not divide.
- Windows are made in a thread, some ahead of the trainer. The state is that of the last step handed out, never of
  what has been made ahead. The thread begins with the first step and ends with the last one, or with ``close``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from postlude.data.document import Block
from postlude.data.windows import Cursor, UnitSource, Window, WindowReader
from postlude.errors import DataError


@dataclass(frozen=True)
class StepBlocks:
    """The work of one optimiser step."""

    blocks: list[Block]
    """This rank's share: the same number on every rank, some of them empty where they do not divide."""
    epoch: int
    """Counted from 0."""
    progress: float
    """The share of the planned work that is done after this step, 0 to 1."""
    documents: int
    """Of all ranks."""
    tokens: int
    """Of all ranks, without padding."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What whoever made the step has to tell of it."""


class Loader:
    """An iterator over steps. Exactly one of ``epochs`` and ``steps`` says how long it goes on.

    ``block`` is in tokens, ``window`` in blocks, ``ahead`` in windows. ``waiting`` is entered, with a sentence that
    says what is waited for, whenever a step is not ready when it is asked for. ``complete`` is called on this rank's
    blocks when they are handed out: what it adds to them is never held for the windows made ahead.

    Iterating raises DataError if an epoch yields nothing to train on, and whatever a source raises, with the
    traceback of the thread in which it happened; asked again, it reads the same step again.
    """

    def __init__(
        self,
        sources: Mapping[str, UnitSource],
        weights: Mapping[str, float],
        *,
        seed: int,
        block: int,
        blocks_per_step: int,
        window: int,
        epochs: int | None = None,
        steps: int | None = None,
        rank: int = 0,
        world: int = 1,
        ahead: int = 2,
        waiting: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        complete: Callable[[Block], Block] = lambda block: block,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ValueError("A loader goes on for a number of epochs or a number of steps: give one of them.")
        self._reader = WindowReader(sources, weights, seed=seed, block=block, window=window)
        self._blocks_per_step, self._epochs, self._steps = blocks_per_step, epochs, steps
        self._rank, self._world, self._ahead, self._waiting = rank, world, ahead, waiting
        self._complete = complete
        self._mixture = self._reader.mixture
        self._count_draws()
        self._step = 0
        self._cursor = self._reader.start
        """Where the window of the next block begins."""
        self._position = 0
        """How many blocks of that window have been handed out."""
        self._window: Window | None = None
        """That window, unless it has yet to be fetched."""
        self._thread: ThreadPoolExecutor | None = None
        self._windows: Iterator[Window] = iter(())
        """The windows after it, as the thread makes them."""
        self._futures: deque[Future[Window]] = deque()
        """Those that it makes ahead. Past the last one there is nothing to be had, and nobody asks for it."""

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBlocks:
        if self._cursor.epoch == self._epochs or self._step == self._steps:
            self.close()
            raise StopIteration
        before = self._cursor, self._position
        try:
            epoch, blocks = self._cursor.epoch, self._take()
            share = [self._complete(block) for block in blocks[self._rank :: self._world]]
        except BaseException:  # also an interrupt: the windows taken so far are not in the state
            self._cursor, self._position = before
            self.close()
            raise
        self._step += 1
        empty: Block = ()
        return StepBlocks(
            blocks=share + [empty] * (-(-len(blocks) // self._world) - len(share)),
            epoch=epoch,
            progress=self._progress(),
            documents=sum(len(unit.documents) for block in blocks for unit in block),
            tokens=sum(len(unit) for block in blocks for unit in block),
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as JSON: the same on every rank and for every number of them."""
        return {
            "step": self._step,
            "epoch": self._cursor.epoch,
            "window": self._cursor.window,
            "position": self._position,
            "draws": self._cursor.draws,
            "cursors": dict(self._cursor.sources),
            "rows": self._reader.rows,
            **({"mixture": changed} if (changed := self._mixture.state()) else {}),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the step that comes after ``state``. DataError if the sources hold other rows than then."""
        then, now = state["rows"], self._reader.rows
        if then != now:
            raise DataError(
                f"The data are not those that the run was stopped with: then records by data set were {then}, now they "
                f"are {now}, so the order cannot be continued. Restore the data, or start a new run."
            )
        self.close()
        self._step, self._position = state["step"], state["position"]
        self._cursor = Cursor(state["cursors"], state["draws"], state["epoch"], state["window"])
        self._mixture.load(state.get("mixture", []))
        self._count_draws()

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Draw with other weights from the end of the window on of which blocks were handed out, or at once."""
        if weights == self._mixture.weights:
            return
        if self._position and self._window is None:
            self._window = self._next_window()
        begins = self._window.end.draws if self._window and self._position else self._cursor.draws
        self.close()  # what was made ahead was drawn with the weights before
        self._mixture.reweigh(begins, weights)
        self._count_draws()

    def close(self) -> None:
        """Stop making windows ahead, and wait until the thread has ended. The next step begins a new one."""
        if self._thread is not None:
            self._reader.stopped.set()
            with self._waiting("the thread that prepares data to end"):
                self._thread.shutdown(cancel_futures=True)
        self._thread, self._window = None, None
        self._futures.clear()

    def _take(self) -> list[Block]:
        """The next step's blocks, of all ranks."""
        blocks: list[Block] = []
        epoch = self._cursor.epoch
        while len(blocks) < self._blocks_per_step and self._cursor.epoch == epoch:
            if self._window is None:
                self._window = self._next_window()
            missing = self._blocks_per_step - len(blocks)
            part = self._window.blocks[self._position : self._position + missing]
            blocks += part
            self._position += len(part)
            if self._position == len(self._window.blocks):
                self._cursor, self._position, self._window = self._window.end, 0, None
        return blocks

    def _next_window(self) -> Window:
        if self._thread is None:
            self._reader.stopped.clear()
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="postlude-data")
            self._windows = self._reader.windows(self._cursor, self._epochs)
            self._futures.extend(self._thread.submit(next, self._windows) for _ in range(self._ahead))
        self._futures.append(self._thread.submit(next, self._windows))
        future = self._futures.popleft()
        if future.done():
            return future.result()
        cursor = self._cursor
        with self._waiting(f"training data to be packed: window {cursor.window} in epoch {cursor.epoch}"):
            return future.result()

    def _count_draws(self) -> None:
        self._total_draws = self._mixture.epoch_end(self._epochs - 1) if self._epochs else 0

    def _progress(self) -> float:
        if self._steps is not None:
            return self._step / self._steps
        done = float(self._cursor.draws)
        if self._window is not None:
            window = self._window
            done += (window.end.draws - window.start.draws) * self._position / len(window.blocks)
        return done / self._total_draws
