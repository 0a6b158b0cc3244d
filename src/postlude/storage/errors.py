"""What can go wrong with storage, as errors that a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from postlude.errors import UserError


class StorageError(UserError):
    """A place cannot be read or written as it should."""


class StorageFull(StorageError):
    """There is no room left."""


class NotWritable(StorageError):
    """The place may not be written to, or cannot be: read-only, no permission, a file where a folder should be."""


class NotReadable(StorageError):
    """The place may not be read."""


class NotFound(StorageError, FileNotFoundError):
    """There is nothing at the place."""


class CorruptError(StorageError):
    """What stands there is not what was written."""


class LockedError(StorageError):
    """Another process holds the lock."""


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Tell what prevents a read from ``uri`` as a :class:`StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"There is nothing at '{uri}'. Check the path.") from error
    except PermissionError as error:
        raise NotReadable(f"'{uri}' may not be read ({_reason(error)}). Check its permissions.") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise NotReadable(f"'{uri}' cannot be read as a file ({_reason(error)}). Check the path.") from error


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Tell what prevents a write to ``uri`` as a :class:`StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise NotWritable(
            f"'{uri}' cannot be written ({_reason(error)}): a file and a folder are in each other's place. "
            "Choose another place or remove what stands there."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"There is no room left to write '{uri}' ({_reason(error)}). Free some space there and run again."
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise NotWritable(
                f"'{uri}' may not be written ({_reason(error)}). Choose another place or change its permissions."
            ) from error
        raise


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
