"""What of the kernel a program does without: a filter (seccomp) over system calls, which nothing takes off again.

It bars from starting processes, for root too, from other processes, from outliving the one that watches, from memory
that no limit counts, from new namespaces and mounts, and from kinds of sockets that no namespace parts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

_NUMBERS: dict[str, tuple[int, int]] = {  # on x86_64, on aarch64
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
}
_SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "pidfd_open")
_FORKS = ((57, 58), ())
"""The calls that only start processes: fork and vfork."""
_CLONE, _CLONE3, _PRCTL, _SOCKET = (56, 220), (435, 435), (157, 167), (41, 198)
_CLONE_THREAD = 0x00010000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2

Families = tuple[int, ...] | None
"""The families of sockets that may be made; None for all."""
OWN_NETWORK: Families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
"""Those that a namespace of the network parts from the machine's."""


def bar(may_signal: bool, families: Families) -> None:
    """Bar this process from what it needs not; it starts no other from here on, but threads. ``may_signal`` where its
    namespace holds no process but its own. OSError where this machine has no filter for it."""
    place, architecture = _ARCHITECTURES.get(os.uname().machine, (0, 0))
    if not architecture:
        raise OSError(errno.ENOSYS, f"no filter of system calls is known for {os.uname().machine}")
    denied, absent = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, denied), (_LOAD, 0, 0, 0)]
    if place == 0:  # the numbers of x32, another way to the same calls
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, denied)]
    barred = [numbers[place] for name, numbers in _NUMBERS.items() if not (may_signal and name in _SIGNALS)]
    for number in (*barred, *_FORKS[place]):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    program += [(_EQUAL, 0, 1, _CLONE3[place]), (_RETURN, 0, 0, absent)]  # its flags cannot be seen; clone goes instead
    program += [(_EQUAL, 0, 4, _CLONE[place]), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD)]
    program += [(_RETURN, 0, 0, denied), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 4, _PRCTL[place]), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, _PR_SET_PDEATHSIG)]
    program += [(_RETURN, 0, 0, denied), (_RETURN, 0, 0, _ALLOW)]
    if families is not None:
        program += [(_EQUAL, 0, len(families) + 2, _SOCKET[place]), (_LOAD, 0, 0, 16)]
        program += [(_EQUAL, len(families) - index, 0, family) for index, family in enumerate(families)]
        program += [(_RETURN, 0, 0, denied)]
    program += [(_RETURN, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    text = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(text)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")
