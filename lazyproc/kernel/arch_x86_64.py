"""The facts of x86-64: register layout, system call numbers used remotely, restarts, the bounds of user space."""

from __future__ import annotations

import operator
import re
import struct

from lazyproc.model import PAGE, Registers

REGISTERS = struct.Struct("<27Q")  # user_regs_struct
TASK_SIZE = (1 << 47) - PAGE
RED_ZONE = 128  # bytes below the stack pointer that belong to the function (System V ABI)
SYSCALL_INSTRUCTION = b"\x0f\x05"
USER_CS = 0x33  # __USER_CS, 64-bit code
MASK64 = (1 << 64) - 1

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
EINTR = 4

# arch/x86/entry/syscalls/syscall_64.tbl
SYS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "poll": 7,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "ioctl": 16,
    "readv": 19,
    "writev": 20,
    "mremap": 25,
    "madvise": 28,
    "shmat": 30,
    "nanosleep": 35,
    "getitimer": 36,
    "msync": 26,
    "setitimer": 38,
    "getpid": 39,
    "connect": 42,
    "accept": 43,
    "sendto": 44,
    "recvfrom": 45,
    "sendmsg": 46,
    "recvmsg": 47,
    "listen": 50,
    "socketpair": 53,
    "wait4": 61,
    "semop": 65,
    "fcntl": 72,
    "flock": 73,
    "fchdir": 81,
    "umask": 95,
    "setpgid": 109,
    "setsid": 112,
    "setgroups": 116,
    "setresuid": 117,
    "setresgid": 119,
    "setfsuid": 122,
    "setfsgid": 123,
    "capset": 126,
    "rt_sigtimedwait": 128,
    "rt_sigqueueinfo": 129,
    "sigaltstack": 131,
    "personality": 135,
    "prctl": 157,
    "mlockall": 151,
    "arch_prctl": 158,
    "chroot": 161,
    "gettid": 186,
    "futex": 202,
    "io_setup": 206,
    "io_getevents": 208,
    "set_tid_address": 218,
    "restart_syscall": 219,
    "semtimedop": 220,
    "timer_create": 222,
    "timer_settime": 223,
    "timer_gettime": 224,
    "timer_getoverrun": 225,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "epoll_wait": 232,
    "epoll_ctl": 233,
    "openat": 257,
    "unshare": 272,
    "set_robust_list": 273,
    "epoll_pwait": 281,
    "accept4": 288,
    "dup3": 292,
    "rt_tgsigqueueinfo": 297,
    "recvmmsg": 299,
    "sendmmsg": 307,
    "setns": 308,
    "seccomp": 317,
    "userfaultfd": 323,
    "membarrier": 324,
    "mlock2": 325,
    "rseq": 334,
    "clone3": 435,
    "close_range": 436,
    "epoll_pwait2": 441,
}
# They fail with EINTR where others are made again: waits without a restart (fs/eventpoll.c, kernel/signal.c, fs/aio.c,
# ipc/sem.c), and what waits at a socket no longer than SO_RCVTIMEO or SO_SNDTIMEO says (sock_intr_errno).
ENDED_BY_STOP = frozenset(
    SYS[name]
    for name in (
        *(
            "epoll_wait",
            "epoll_pwait",
            "epoll_pwait2",
            "rt_sigtimedwait",
            "io_getevents",
            "semop",
            "semtimedop",
        ),
        *("read", "readv", "recvfrom", "recvmsg", "recvmmsg", "accept", "accept4"),
        *("write", "writev", "sendto", "sendmsg", "sendmmsg", "connect"),
    )
)

ARCH_MAP_VDSO_64 = 0x2003


def unpack_registers(raw: bytes) -> Registers:
    """The bytes of user_regs_struct as Registers."""
    return Registers(*REGISTERS.unpack(raw))


def pack_registers(registers: Registers) -> bytes:
    return REGISTERS.pack(*registers)


def restart_code(registers: Registers) -> int:
    """ERESTART* when a system call was interrupted and has not been restarted yet, else 0."""
    if registers.orig_ax >> 63:
        return 0
    code = (1 << 64) - registers.ax
    return code if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK) else 0


def ended_by_stop(registers: Registers) -> bool:
    """Whether a system call has failed with EINTR that does so even for a mere freeze."""
    return registers.orig_ax in ENDED_BY_STOP and registers.ax == MASK64 - EINTR + 1


def call_arguments(registers: Registers) -> tuple[int, ...]:
    """The six arguments of the system call the registers stand in."""
    return registers.di, registers.si, registers.dx, registers.r10, registers.r8, registers.r9


CALL_LENGTH = 7  # bytes of `mov $nr, %eax; syscall`


def number_in_code(code: bytes) -> int | None:
    """The number that the `mov $nr, %eax; syscall` in `code` loads, None when it is something else.

    glibc and Go compile most system calls to just that; syscall(3) takes the number from a register.
    """
    if len(code) != CALL_LENGTH or code[0] != 0xB8 or code[5:] != SYSCALL_INSTRUCTION:
        return None
    return int.from_bytes(code[1:5], "little")


def rewind(registers: Registers, nr: int | None = None) -> Registers:
    """Registers that make the interrupted call again when the thread runs, or call `nr` in its place."""
    return registers._replace(
        ax=registers.orig_ax if nr is None else nr,
        ip=registers.ip - len(SYSCALL_INSTRUCTION),
        orig_ax=MASK64,
    )


def calling(registers: Registers, ip: int, nr: int, args: tuple[int, ...]) -> Registers:
    """Registers that make one system call at the `syscall` instruction `ip`; all others are kept."""
    di, si, dx, r10, r8, r9 = (*(arg & MASK64 for arg in args), 0, 0, 0, 0, 0, 0)[:6]
    return registers._replace(ip=ip, ax=nr, orig_ax=MASK64, di=di, si=si, dx=dx, r10=r10, r8=r8, r9=r9)


def is_64bit(registers: Registers) -> bool:
    return registers.cs == USER_CS


# --- the way home ----------------------------------------------------------------------------------------------

_LOADS = {  # movabs $imm64, %register
    "ax": b"\x48\xb8",
    "cx": b"\x48\xb9",
    "dx": b"\x48\xba",
    "bx": b"\x48\xbb",
    "si": b"\x48\xbe",
    "di": b"\x48\xbf",
    "r8": b"\x49\xb8",
    "r9": b"\x49\xb9",
    "r10": b"\x49\xba",
    "r11": b"\x49\xbb",
    "r12": b"\x49\xbc",
    "r13": b"\x49\xbd",
    "r14": b"\x49\xbe",
    "r15": b"\x49\xbf",
}
_RT_SIGPROCMASK, _SIG_SETMASK = 14, 2
_CF_TO_SF, _OF = 0xD5, 0x800  # carry, parity, adjust, zero, sign; overflow


def _home_layout() -> list[tuple[bytes, str]]:
    """Instructions as (what is always the same, the format of what varies): flags, registers, ip, mask."""
    after = [
        (b"\xba\0\0\0\0" + b"\x41\xba\x08\0\0\0", ""),  # mov $0, %edx (no old mask); mov $8, %r10d (bytes)
        (SYSCALL_INSTRUCTION, ""),
        (b"\xb8", "I"),  # mov $flags:overflow, %eax
        (b"\x04\x01", ""),  # add $1, %al, which overflows from 0x7f only
        (b"\x9e", ""),  # sahf sets the other flags
        *((load, "Q") for load in _LOADS.values()),
        (b"\xff\x25\0\0\0\0", "Q"),  # jmp *(%rip), to the ip that follows
    ]
    mask = sum(len(fixed) + struct.calcsize("<" + varying) for fixed, varying in after)
    return [
        (b"\xb8" + struct.pack("<I", _RT_SIGPROCMASK), ""),  # mov $nr, %eax
        (b"\xbf" + struct.pack("<I", _SIG_SETMASK), ""),  # mov $how, %edi
        (b"\x48\x8d\x35" + struct.pack("<i", mask), ""),  # lea mask(%rip), %rsi
        *after,
        (b"", "Q"),
    ]


_HOME_LAYOUT = _home_layout()
_HOME_STRUCT = struct.Struct("<" + "".join(f"{len(fixed)}s{varying}" for fixed, varying in _HOME_LAYOUT))


def _home_fields() -> list[bytes | int]:
    """What `_HOME_STRUCT` packs, with 0 for all that varies."""
    fields: list[bytes | int] = []
    for fixed, varying in _HOME_LAYOUT:
        fields += [fixed, 0] if varying else [fixed]
    return fields


_HOME_FIELDS = _home_fields()
_HOME_VARYING = [at for at, part in enumerate(_HOME_FIELDS) if part == 0]
_LOADED = operator.attrgetter(*_LOADS)
HOME_SIZE = _HOME_STRUCT.size
HOME = re.compile(  # matches any way home, whosever it was
    b"".join(re.escape(fixed) + b".{%d}" % struct.calcsize("<" + varying) for fixed, varying in _HOME_LAYOUT),
    re.DOTALL,
)


def way_home(registers: Registers, blocked: int) -> bytes:
    """Code that gives a thread these registers and this signal mask, and goes on at registers.ip.

    It neither uses the stack nor changes sp and bp, which it expects to be the thread's own; vector state is not
    touched. A system call that was interrupted is continued, a sleep to its own deadline: no signal frame is
    returned from, so the kernel's restart block is still there.
    """
    to = continued(registers)
    flags = (0x7F if to.flags & _OF else 0) | (to.flags & _CF_TO_SF) << 8
    fields = _HOME_FIELDS.copy()
    for at, value in zip(_HOME_VARYING, (flags, *_LOADED(to), to.ip, blocked), strict=True):
        fields[at] = value
    return _HOME_STRUCT.pack(*fields)


def continued(registers: Registers) -> Registers:
    """The same, with an interrupted system call made again as the kernel itself would (arch/x86/kernel/signal.c)."""
    code = restart_code(registers)
    if not code:
        return registers
    return rewind(registers, SYS["restart_syscall"] if code == ERESTART_RESTARTBLOCK else None)


# --- parking ---------------------------------------------------------------------------------------------------

PARK = b"\xb8" + struct.pack("<I", 34) + SYSCALL_INSTRUCTION + b"\xeb\xf7" + b"\xeb\xfe"
"""pause(2) for ever: `1: mov $34, %eax; syscall; jmp 1b`. Behind it, at SPIN, a loop without a call: `2: jmp 2b`."""
SPIN = len(PARK) - 2


def parked(registers: Registers, at: int) -> Registers:
    """Registers of a thread that runs the code at `at` from now on; no interrupted call is made again there."""
    return registers._replace(ip=at, ax=0, orig_ax=MASK64)
