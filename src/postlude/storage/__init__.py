"""Every read and write of the project: files behind URIs, atomic commits, journals and locks."""

from postlude.storage.commits import (
    MARKER,
    Digest,
    begin,
    commit,
    discard,
    is_committed,
    open_hashed,
    read_marker,
    sha256_of,
    verify,
)
from postlude.storage.errors import (
    CorruptError,
    LockedError,
    NotFound,
    NotReadable,
    NotWritable,
    StorageError,
    StorageFull,
    explain,
)
from postlude.storage.files import (
    create,
    exists,
    expand,
    is_directory,
    is_local,
    join,
    list_directory,
    local_path,
    modified_fingerprint,
    name,
    open_file,
    parent,
    read_bytes,
    read_text,
    remove,
    size_bytes,
    write_bytes,
    write_text,
)
from postlude.storage.folders import copy_file, copy_folder, fetch, link_file, new_folder
from postlude.storage.journal import Journal
from postlude.storage.locks import Holder, Lock, holder, lock
from postlude.storage.scratch import Scratch, scratch_folder
