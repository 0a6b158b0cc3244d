"""A kernel that refuses ``flock``, for real: what a file system without such locks says, said of all of them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import tempfile

import pytest

_NUMBERS = {"x86_64": 73, "aarch64": 32}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


def refuse_flock(number: int = errno.ENOLCK) -> None:
    """From now on ``flock`` fails with this errno in this process and those that it starts; nothing undoes it. OSError
    where the kernel has no such filters."""
    steps = [
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_JUMP_IF_EQUAL, 0, 1, _NUMBERS[platform.machine()]),
        (_RETURN, 0, 0, _ERROR | number),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, header, 0, 0)):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def require_refusal() -> None:
    """Skip the test where a kernel cannot be made to refuse."""
    child = os.fork()
    if not child:
        try:
            refuse_flock()
            with tempfile.TemporaryFile() as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != errno.ENOLCK:
        pytest.skip(f"the kernel cannot be made to refuse flock here: {code}")
