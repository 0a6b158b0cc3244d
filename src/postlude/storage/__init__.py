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
from postlude.storage.encryption import is_encrypted
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
from postlude.storage.extent import Extent, Follower, extent_of, read_extent, restore
from postlude.storage.files import (
    create,
    exists,
    expand,
    is_directory,
    list_directory,
    modified_fingerprint,
    modified_fingerprints,
    open_file,
    read_bytes,
    read_range,
    read_text,
    remove,
    size_bytes,
    write_bytes,
    write_text,
)
from postlude.storage.folders import (
    clear_path,
    copy_file,
    copy_folder,
    fetch,
    folder_for_copy,
    has_path,
    link_file,
    new_folder,
)
from postlude.storage.guards import Guard, Lock, guarded, make_folders, set_guard, shared_guard
from postlude.storage.holders import Holder
from postlude.storage.journal import Journal
from postlude.storage.locks import holder, lock
from postlude.storage.reader import Entries, Part, Reader
from postlude.storage.schema import Line, NewerSchema
from postlude.storage.scratch import Scratch, memory_folder, scratch_folder
from postlude.storage.sealed import (
    damaged,
    is_as_named,
    name_with_digest,
    plain_name,
    read_committed,
    read_document,
    read_sealed_text,
    set_aside,
    whole_files,
    write_document,
    write_once,
    write_sealed_text,
)
from postlude.storage.uris import is_local, join, local_path, name, parent
