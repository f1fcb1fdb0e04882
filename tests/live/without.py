"""Runs a command on a kernel that seems to lack a system call: python -m tests.live.without NAME COMMAND...

A seccomp filter gives the errno that such a kernel gives.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
NUMBER, FIRST_ARGUMENT, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 16, 24, 32  # offsets in struct seccomp_data
IOCTL, SOCKET = 16, 41
PAGEMAP_SCAN = 0xC0606610
AF_NETLINK, NETLINK_NETFILTER = 16, 12
CALLS = {"ptrace": 101, "userfaultfd": 323, "pidfd_getfd": 438, "process_vm_readv": 310, "clone3": 435}


def program(name: str) -> list[tuple[int, int, int, int]]:
    """The filter: code, jump if true, jump if false, constant."""
    if name == "pagemap_scan":
        return [
            (LOAD, 0, 0, NUMBER),
            (EQUAL, 0, 3, IOCTL),
            (LOAD, 0, 0, SECOND_ARGUMENT),
            (EQUAL, 0, 1, PAGEMAP_SCAN),
            (RETURN, 0, 0, FAIL | errno.ENOTTY),
            (RETURN, 0, 0, ALLOW),
        ]
    if name == "nf_tables":
        return [
            (LOAD, 0, 0, NUMBER),
            (EQUAL, 0, 5, SOCKET),
            (LOAD, 0, 0, FIRST_ARGUMENT),
            (EQUAL, 0, 3, AF_NETLINK),
            (LOAD, 0, 0, THIRD_ARGUMENT),
            (EQUAL, 0, 1, NETLINK_NETFILTER),
            (RETURN, 0, 0, FAIL | errno.EPROTONOSUPPORT),
            (RETURN, 0, 0, ALLOW),
        ]
    return [
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 1, CALLS[name]),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
        (RETURN, 0, 0, ALLOW),
    ]


def main() -> None:
    rows = program(sys.argv[1])
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
    header = struct.pack("=HxxxxxxQ", len(rows), ctypes.addressof(code))
    if ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        sys.exit("seccomp: it takes CAP_SYS_ADMIN")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
