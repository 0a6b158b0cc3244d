"""Reads torch's distributed checkpoints without running what stands in them: their plan is a pickle, and so are values
that are no tensors. Only the few classes of a plan are made of the first, and only plain values of the second.

Whoever reads a checkpoint verifies it against its marker before.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from postlude import storage
from postlude.storage import CorruptError

PLAN_FILE = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class StorageFiles(FileSystemBase):
    """What torch's checkpoint reader and writer need of a file system, over :mod:`postlude.storage`.

    Folders need no making there, and nothing is renamed or removed.
    """

    def __init__(self) -> None:
        self.digests: dict[str, storage.Digest] = {}
        """Of what was written, by name."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode == "rb":
            with storage.open_file(str(path), "rb") as stream:
                yield stream
            return
        with storage.open_hashed(str(path)) as file:
            yield file
        self.digests[storage.name(str(path))] = file.digest

    def concat_path(self, path: Any, suffix: str) -> str:
        return storage.join(str(path), suffix)

    def init_path(self, path: Any) -> str:
        return str(path)

    def mkdir(self, path: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return storage.exists(str(path))

    def rename(self, path: Any, new_path: Any) -> None:
        raise AssertionError("a committed folder is not renamed into")

    def rm_file(self, path: Any) -> None:
        raise AssertionError("a committed folder is not removed from")


class Reader(FileSystemReader):
    """Of the checkpoint at a URI."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs, self.path = StorageFiles(), uri  # type: ignore[assignment]

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        """The plan. CorruptError if it names what no plan has."""
        place = storage.join(str(self.path), PLAN_FILE)
        try:
            plan = _PlanReader(io.BytesIO(storage.read_bytes(place))).load()
        except (pickle.UnpicklingError, ValueError, EOFError, AttributeError, TypeError, LookupError) as error:
            raise CorruptError(f"'{place}' is not the plan of a checkpoint: {error}.") from error
        if not isinstance(plan, Metadata):
            raise CorruptError(f"'{place}' is not the plan of a checkpoint, but of type {type(plan).__name__}.")
        plan.storage_meta = getattr(plan, "storage_meta", None) or distributed_checkpoint.metadata.StorageMeta()
        plan.storage_meta.load_id = self.load_id
        return plan


class Planner(DefaultLoadPlanner):
    """Takes plain values alone, beside tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load(uri: str, tensors: dict[str, Any], alone: bool) -> None:
    """Read what stands in a checkpoint into ``tensors``, in place. ``alone``: this is the only rank that does."""
    distributed_checkpoint.load(tensors, storage_reader=Reader(uri), planner=Planner(), no_dist=alone)


class _PlanReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_kind = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_kind or (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
