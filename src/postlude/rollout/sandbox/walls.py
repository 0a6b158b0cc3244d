"""What parts a program from the machine: namespaces with a root of its own, or Landlock where those are not given.

Both are rights that a process gives up, as root and as a user. See ``docs/stages.md``
for what holds with which.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from postlude.rollout.sandbox.system_calls import OWN_NETWORK, Families, bar

NAMESPACES, LANDLOCK, BUBBLEWRAP, NOTHING = "namespaces", "Landlock", "bubblewrap", "nothing"
"""What there may be. Within bubblewrap the rest of this file's work is done."""
LARGEST_FILE, ALL_FILES, MOST_FILES = 16 * 2**20, 64 * 2**20, 4096
"""Of one file and of all together, in bytes; and how many there may be."""
MOST_THREADS = 64
"""Of the program and the judge together, at a time. Neither starts a process."""

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _SYS_PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/nix")

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def readable() -> list[str]:
    """The folders that a program may read: those of the system and of this interpreter, the outermost of each."""
    python = [sys.base_prefix, sys.prefix, *(path for path in sys.path if os.path.isdir(path))]
    folders: list[str] = []
    for folder in sorted({*_SYSTEM, *map(os.path.realpath, python), *python}, key=len):
        if not any(os.path.commonpath([folder, known]) == known for known in folders):
            folders.append(folder)
    return [folder for folder in folders if os.path.exists(folder)]


def die_with_parent(signal: int) -> None:
    """Get a signal when the thread ends that has started this process. To be called after rights were given up, too."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal))


def adopt_orphans() -> None:
    """Become the parent of what loses its own below this process."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def leave_machine() -> None:
    """Part what this process starts from the machine's network, its processes and its means of communication. OSError
    where that is not allowed."""
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWIPC | _CLONE_NEWUTS
    _checked(_libc.unshare(flags if user == 0 else flags | _CLONE_NEWUSER))
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(root: str) -> None:
    """Mount what shall be the root: system folders and this interpreter's, to be read, and an empty ``/tmp``."""
    _checked(_libc.unshare(_CLONE_NEWNS))
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("root", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for folder in readable():
        _show(folder, root)
    for setting in filter(os.path.exists, _SETTINGS):
        _show(setting, root)
    for empty in ("tmp", "run", "dev", "proc", "var/tmp"):
        os.makedirs(os.path.join(root, empty), exist_ok=True)
    _set_attributes(root, _READ_ONLY | _NO_SUID | _NO_DEVICES)
    files = f"size={ALL_FILES},nr_inodes={MOST_FILES},mode=1777"
    _mount("tmp", os.path.join(root, "tmp"), "tmpfs", _MS_NOSUID | _MS_NODEV, files)


def _show(path: str, root: str) -> None:
    """Let something of the machine be seen at the same place below a root."""
    place = root + path
    if os.path.lexists(place):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path) and path in _SYSTEM:
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place)
    else:
        with open(place, "w"):
            pass
    _mount(path, place, None, _MS_BIND | _MS_REC)


@contextmanager
def new_processes() -> Iterator[None]:
    """Let what this process starts meanwhile see no process but its own."""
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    _checked(_libc.unshare(_CLONE_NEWPID))
    yield
    _checked(_libc.setns(ours, _CLONE_NEWPID))  # else this process could have no thread
    os.close(ours)


def enter_root(root: str) -> None:
    """Make the root that was built this process's, and that of all who share its mounts. ``/proc`` shows the processes
    of the namespace; nothing where a container keeps parts of its own from sight, as none may be mounted there."""
    with suppress(OSError):
        _mount("proc", os.path.join(root, "proc"), "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(root)
    _checked(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    _checked(_libc.umount2(b".", _MNT_DETACH))
    os.chdir("/tmp")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()))


def _set_attributes(path: str, attributes: int) -> None:
    values = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(values))
    place, how = ctypes.c_int(_AT_FDCWD), ctypes.c_uint(_AT_RECURSIVE)
    _checked(_libc.syscall(_SYS_MOUNT_SETATTR, place, os.fsencode(path), how, values, size))


def give_up_rights(walls: str) -> None:
    """Keep no right but those of a user, as root too. Nothing brings one back, and a process of the same user does not
    look into this one."""
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if walls != NOTHING:
        _checked(_libc.capset(version, (ctypes.c_uint32 * 6)()))
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


# --- Landlock -----------------------------------------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8


def restrict(folder: str) -> None:
    """Let this process, and all that it starts, read what :func:`readable` names and write below ``folder``; reach no
    port of TCP, and send signals to none but what it starts, as far as the kernel knows how. OSError where it has no
    Landlock, or one that does not keep files from being cut."""
    version = _checked(_libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))
    if version < 3:
        raise OSError("Landlock of this kernel is too old")
    files = (1 << (15 if version < 5 else 16)) - 1
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = ctypes.c_size_t(8 if version < 4 else 16 if version < 6 else 24)
    ruleset = _checked(_libc.syscall(_CREATE, rules, size, ctypes.c_uint(0)))
    for path, rights in _rights(folder, files):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = rights if os.path.isdir(path) else rights & ~_LIST
        rule = struct.pack("=Qi", rights, place)
        _checked(_libc.syscall(_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0)))
        os.close(place)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc.syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)))
    os.close(ruleset)


def _rights(folder: str, files: int) -> Iterator[tuple[str, int]]:
    for path in (*readable(), *filter(os.path.exists, _SETTINGS)):
        yield path, _EXECUTE | _READ | _LIST
    no_devices = ~((1 << 6) | (1 << 11) | (1 << 15))  # character and block devices are neither made nor spoken to
    yield folder, files & no_devices


# --- limits -------------------------------------------------------------------------------------------------


def limit(walls: str, seconds: float, memory: int) -> None:
    """Set the limits of this process by itself, and bar it from what it needs not of the kernel. What judge and program
    may have together is the supervisor's to see."""
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    families: Families = None if walls == NOTHING else () if walls == LANDLOCK else OWN_NETWORK
    bar(may_signal=walls == NAMESPACES, families=families)
