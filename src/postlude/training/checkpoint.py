"""Checkpoints: the whole state of a stage, saved while training goes on, committed by one marker.

A checkpoint is a folder of ``torch.distributed.checkpoint`` files and a marker, written last, that holds the
digest of every file and the small state (step, loader, loss scale, ...). Without its marker it does not exist;
with a digest that does not match it is passed over for the one before. All bytes go through
:mod:`postlude.storage`, which is where remote places are known.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils._pytree import tree_map_only

from postlude import storage
from postlude.model import checkpoint_reader
from postlude.model.checkpoint_reader import PLAN_FILE, StorageFiles
from postlude.model.mesh import own_part
from postlude.training.program import Role
from postlude.training.workers import COLLECTIVE_DEADLINE, Workers

State = dict[str, Any]

# One process alone is meant to be alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _Writer(FileSystemWriter):
    """Writes the metadata straight to its place: the marker, not a rename, is what makes a checkpoint real."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, sync_files=False)
        self.fs = self.files = StorageFiles()  # type: ignore[assignment]
        self.path = uri

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        with self.files.create_stream(storage.join(self.path, PLAN_FILE), "wb") as stream:  # type: ignore[arg-type]
            pickle.dump(metadata, stream)


class Checkpointer:
    """Saves the state of a stage in the background, one checkpoint at a time.

    ``on_commit`` is called on the leading rank after a marker is written, from the background thread.
    """

    def __init__(self, workers: Workers, on_commit: Callable[[str, int], None]) -> None:
        self.workers, self.on_commit = workers, on_commit
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_DEADLINE) if workers.world > 1 else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, uri: str, step: int, tensors: State, small: Mapping[str, Any], background: bool) -> None:
        """Save ``tensors`` (copied first if in the background) and the JSON-able ``small`` state under ``uri``.

        Returns at once; :meth:`wait` tells how it went, and has to be called before the next save.
        """
        assert self._pending is None, "the save before has not been waited for"
        if background:
            tensors = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), tensors)
        self._pending = self._thread.submit(self._write, uri, step, tensors, dict(small))

    def wait(self) -> None:
        """Wait for the save in progress and raise what it raised: :class:`postlude.storage.StorageFull` when the disk
        was full, and then nothing of the failed checkpoint stays.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save in progress and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, uri: str, step: int, tensors: State, small: dict[str, Any]) -> None:
        if self.workers.leads:
            storage.begin(uri)
        if self._group is not None:
            dist.barrier(self._group)
        writer = _Writer(uri)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            if self.workers.leads:
                storage.remove(uri)
            cause = next(iter(error.failures.values()))  # torch wraps each rank's exception
            raise (cause[0] if isinstance(cause, tuple) else cause) from error
        digests = self._gather(writer.files.digests)
        failure: OSError | storage.StorageError | None = None
        if self.workers.leads:
            try:
                files = {name: digest for part in digests for name, digest in part.items()}
                storage.commit(uri, files, {"step": step, **small})
                self.on_commit(uri, step)
            except (OSError, storage.StorageError) as error:
                failure = error
                if not isinstance(error, storage.LockedError):
                    storage.remove(uri)
        failure = self._gather(failure)[0]
        if failure is not None:
            raise failure

    def _gather(self, item: Any) -> list[Any]:
        if self._group is None:
            return [item]
        items: list[Any] = [None] * self.workers.world
        dist.all_gather_object(items, item, self._group)
        return items


def load(uri: str, tensors: State, workers: Workers) -> dict[str, Any]:
    """Read a committed checkpoint, which was verified, into ``tensors``, in place, and return the small state."""
    checkpoint_reader.load(uri, tensors, alone=workers.world == 1)
    return dict(storage.read_marker(uri).extra)


# --- what is in one -----------------------------------------------------------------------------------------


Optimizers = Mapping[str, list[torch.optim.Optimizer]]


def trained_state(roles: Mapping[str, Role], optimizers: Optimizers) -> dict[str, Any]:
    """What is trained of the weights and optimiser state of every role that has one, by role and parameter name.

    The tensors are the live ones: loading into them restores the model. A tied weight is held once.
    """
    state: dict[str, Any] = {}
    only_trained = StateDictOptions(ignore_frozen_params=True)
    for name, role in roles.items():
        if role.optimizer is None:
            continue
        seen: set[int] = set()
        weights = {}
        for key, tensor in get_model_state_dict(role.model, options=only_trained).items():
            if isinstance(tensor, torch.Tensor):
                place = own_part(tensor).untyped_storage().data_ptr()
                if place and place in seen:  # of a small tensor a rank may have nothing
                    continue
                seen.add(place)
            weights[key] = tensor
        state[name] = {
            "model": weights,
            "optimizer": get_optimizer_state_dict(role.model, optimizers[name]),
        }
    return state


def restore_optimizers(state: Mapping[str, Any], roles: Mapping[str, Role], optimizers: Optimizers) -> None:
    """Hand loaded optimiser state, param groups included, back to the optimisers."""
    for name, parts in state.items():
        set_optimizer_state_dict(roles[name].model, optimizers[name], optim_state_dict=parts["optimizer"])
