"""How external engines come by the policy's weights: they are written once for each version, and read from there.

Notable:

- The folder is in shared memory, so that nothing touches a disk.
- Where an engine takes an adapter by itself, the base is written once: later folders link to its files.
- Of the ranks of one host the first writes, and the others link to its files. Ranks that hold the policy together
  gather it tensor by tensor, all hosts at once.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from postlude.model.export import send_weights, write_adapter, write_weights
from postlude.model.language_model import LanguageModel
from postlude.rollout.serving.guardian import Room
from postlude.rollout.serving.server import ADAPTER
from postlude.training.workers import Workers


class WeightTransfer:
    """The newest weights as a folder. ``write`` writes them, as they now are, into one that is empty, and is given that
    of the weights before, if there is one; ``parent`` is where the room is made that holds them."""

    def __init__(self, write: Callable[[Path, Path | None], None], parent: Callable[[], Path]) -> None:
        self._write, self._parent = write, parent
        self._room: Room | None = None
        self.version = -1
        """That of the newest weights; -1 where there are none yet."""
        self._readers: Counter[int] = Counter()
        """Of each version."""
        self._lock = threading.Lock()

    @property
    def room(self) -> Path:
        """The folder that holds everything of this process which engines are to see."""
        if self._room is None:
            self._room = Room(self._parent())
        return self._room.path

    def publish(self, version: int) -> None:
        """Write the weights, which are now those after ``version`` steps. All ranks call it."""
        if version == self.version:
            return
        folder = self._folder(version)
        folder.mkdir()
        self._write(folder, None if self.version < 0 else self._folder(self.version))
        with self._lock:
            before, self.version = self.version, version
            self._put_away(before)

    @contextmanager
    def newest(self) -> Iterator[tuple[Path, int]]:
        """The newest weights and their version, which stay while they are read."""
        with self._lock:
            version = self.version
            assert version >= 0, "weights are given before anything is asked"
            self._readers[version] += 1
        try:
            yield self._folder(version), version
        finally:
            with self._lock:
                self._readers[version] -= 1
                self._put_away(version)

    def close(self) -> None:
        """Leave no file."""
        if self._room is not None:
            self._room.close()
            self._room, self.version = None, -1

    def _put_away(self, version: int) -> None:
        if version not in (self.version, -1) and not self._readers[version]:
            shutil.rmtree(self._folder(version), ignore_errors=True)

    def _folder(self, version: int) -> Path:
        return self.room / f"version-{version}"


def write_for_engines(
    policy: LanguageModel,
    folder: Path,
    dtype: torch.dtype,
    workers: Workers,
    adapter_alone: bool = False,
    before: Path | None = None,
) -> None:
    """Write the policy as engines read it, into a folder of each rank. All ranks call it.

    With ``adapter_alone`` an adapter is not merged into its base, whose files are those of the folder ``before``, if
    there is one. Where the folders of ranks are on one file system, that of the first has the files and the others link
    to them.
    """
    here = (os.uname().nodename, folder.stat().st_dev)
    folders = workers.gather((here, str(folder)))
    first = Path(next(name for where, name in folders if where == here))
    writes = first == folder
    if writes and adapter_alone and before is not None:
        _link(before, folder)
    elif writes:
        write_weights(policy, folder, dtype, merge=not adapter_alone)
    elif policy.mesh is not None and not (adapter_alone and before is not None):
        send_weights(policy, dtype, merge=not adapter_alone)
    if adapter_alone and (writes or policy.mesh is not None):
        write_adapter(policy, folder / ADAPTER if writes else None)
    workers.barrier()
    if not writes:
        _link(first, folder)
        if adapter_alone:
            (folder / ADAPTER).mkdir()
            _link(first / ADAPTER, folder / ADAPTER)


def _link(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file():
            os.link(file, target / file.name)
