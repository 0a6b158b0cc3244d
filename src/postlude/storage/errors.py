"""What can go wrong with storage, as errors that a user can act on."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from postlude.errors import UserError
from postlude.storage import refusals
from postlude.storage.uris import is_local


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


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_OF_WRITING = (*_NO_ROOM, errno.EFBIG, errno.EROFS)
"""What only a write can meet with."""
_OF_THE_DISK = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE)
_LOOK_AFTER_STORE = "Check the address, the network, and what the store lets you do."
_IN_WORDS = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
"""How libraries that are written in Rust tell of an error of the system."""


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Tell what prevents a read from ``uri`` as a :class:`StorageError`."""
    try:
        with _of_a_store(uri, NotReadable, "cannot be read"):
            yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"There is nothing at '{uri}'. Check the path.") from error
    except PermissionError as error:
        raise NotReadable(f"'{uri}' may not be read ({_reason(error)}). Check its permissions.") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise NotReadable(f"'{uri}' cannot be read as a file ({_reason(error)}). Check the path.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise NotFound(f"There can be nothing at '{uri}' ({_reason(error)}). Check the path.") from error
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK and is_local(uri):
            raise NotReadable(f"'{uri}' cannot be read ({_reason(error)}). Look after its disk.") from error
        if (told := _said_of_a_store(error, uri)) is not None:
            raise NotReadable(f"'{uri}' cannot be read ({told}). {_LOOK_AFTER_STORE}") from error
        raise


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Tell what prevents a write to ``uri`` as a :class:`StorageError`."""
    try:
        with _of_a_store(uri, NotWritable, "cannot be written"):
            yield
    except StorageError:
        raise
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise NotWritable(
            f"'{uri}' cannot be written ({_reason(error)}): a file and a folder are in each other's place. "
            "Choose another place or remove what stands there."
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and (explained := explain(error, uri)) is not None:
            raise explained from error
        if isinstance(error, PermissionError):
            raise NotWritable(
                f"'{uri}' may not be written ({_reason(error)}). Choose another place or change its permissions."
            ) from error
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK and is_local(uri):
            raise NotWritable(f"'{uri}' cannot be written ({_reason(error)}). Look after its disk.") from error
        if (told := _said_of_a_store(error, uri)) is not None:
            raise NotWritable(f"'{uri}' cannot be written ({told}). {_LOOK_AFTER_STORE}") from error
        raise


@contextmanager
def writing_below(uri: str) -> Iterator[None]:
    """Tell what prevents other libraries from writing below ``uri``, in a block that may do other things, too."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if (explained := explain(error, uri)) is not None:
            raise explained from error
        raise


def explain(error: BaseException, uri: str | None = None) -> StorageError | None:
    """What a full disk, a limit on files, a disk that is read-only or a name that is too long has raised, by whatever
    library, as an error that a user can act on; None for everything else."""
    number = _number(error)
    place = uri or getattr(error, "filename", None)
    where = f"'{place}'" if place else "what was to be written"
    if number in _NO_ROOM:
        reason = os.strerror(number).lower()
        return StorageFull(f"There is no room left to write {where} ({reason}). Free some space there and run again.")
    if number == errno.EFBIG:
        return StorageFull(
            f"No file may be as large as {where} has to be (file too large): the file system, or a limit of this "
            "process (`ulimit -f`), forbids it. Raise the limit or choose another place, and run again."
        )
    if number == errno.EROFS:
        return NotWritable(
            f"{where} may not be written (read-only file system). Choose another place or change its permissions."
        )
    if number == errno.ENAMETOOLONG:
        return NotWritable(f"{where} has a name or a path that is too long for the file system. Choose a shorter one.")
    return None


def _number(error: BaseException) -> int | None:
    """That of the operating system's error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = _IN_WORDS.search(str(error))
    if said is None:
        return None
    number = int(said[1] or said[2])
    return number if number in _OF_WRITING else None


@contextmanager
def _of_a_store(uri: str, kind: type[StorageError], cannot: str) -> Iterator[None]:
    """Tell what an object store refuses as an error of a kind."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if is_local(uri) or isinstance(error, FileExistsError) or (told := refusals.in_words(error)) is None:
            raise
        raise kind(f"'{uri}' {cannot}: {told[0]}. {told[1]}") from error


def _said_of_a_store(error: Exception, uri: str) -> str | None:
    """What a store far away, or the library that talks to it, says is wrong; None if it is another's error. Not all of
    them make errors of the system of theirs."""
    is_its_own = isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in ("builtins", "postlude")
    if is_local(uri) or not is_its_own:
        return None
    return f"{type(error).__name__}: {error}"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
