"""Vector state that a process gets on request only: AMX tiles (Documentation/arch/x86/xstate.rst, "Dynamic features").

A process asks once and for all its threads, passes the permission on by fork and loses it by exec. A thread then has
room for the state from its first use on; before that ptrace(2) takes none for it (validate_user_xstate_header,
arch/x86/kernel/fpu/xstate.c).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache

from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.kernel.sys import cpuid
from lazyproc.kernel.tracee import XSAVE_MAX

# arch/x86/include/uapi/asm/prctl.h
ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM = 0x1021, 0x1022, 0x1023
XTILEDATA = 18
ON_REQUEST = 1 << XTILEDATA  # xstate_prctl_req of the kernel; every process has the others

_XSTATE_BV = 512  # offset in an xsave area


def supported() -> int:
    """The components that this kernel gives, those on request included; 0 before Linux 5.16."""
    mask = ffi.new("uint64_t *")
    lib.lp_syscall(SYS["arch_prctl"], ARCH_GET_XCOMP_SUPP, int(ffi.cast("uintptr_t", mask)), 0, 0, 0, 0)
    return int(mask[0])


@cache
def offsets() -> Mapping[int, int]:
    """Where this processor has its components in the standard format, by their bits: Intel leaves room for those that
    it lacks, AMD does not (CPUID leaf 0xD).
    """
    leaves = {bit: cpuid(0xD, bit) for bit in range(2, XTILEDATA + 1)}
    return {bit: offset for bit, (size, offset, where, _) in leaves.items() if size and not where & 1}


def blank_area(components: int) -> bytes:
    """An area, to be aligned to 64, from which `xrstor` makes a thread use these components, all bits zero."""
    area = bytearray(XSAVE_MAX)
    struct.pack_into("<Q", area, _XSTATE_BV, components)
    return bytes(area)
