"""The facts of x86-64: register layout, system call numbers used remotely, restarts, the bounds of user space."""

from __future__ import annotations

import struct

from lazyproc.model import PAGE, Registers

REGISTERS = struct.Struct("<27Q")  # user_regs_struct
TASK_SIZE = (1 << 47) - PAGE
RED_ZONE = 128  # bytes below the stack pointer that belong to the function (System V ABI)
SYSCALL_INSTRUCTION = b"\x0f\x05"
MASK64 = (1 << 64) - 1

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
EINTR = 4

# arch/x86/entry/syscalls/syscall_64.tbl
SYS = {
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "ioctl": 16,
    "madvise": 28,
    "shmat": 30,
    "dup": 32,
    "getitimer": 36,
    "setitimer": 38,
    "recvmsg": 47,
    "listen": 50,
    "exit": 60,
    "fcntl": 72,
    "chdir": 80,
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
    "rt_sigqueueinfo": 129,
    "sigaltstack": 131,
    "personality": 135,
    "setpriority": 141,
    "sched_setscheduler": 144,
    "mlock": 149,
    "prctl": 157,
    "arch_prctl": 158,
    "setrlimit": 160,
    "chroot": 161,
    "gettid": 186,
    "io_setup": 206,
    "set_tid_address": 218,
    "timer_create": 222,
    "timer_settime": 223,
    "timer_gettime": 224,
    "timer_getoverrun": 225,
    "timer_delete": 226,
    "epoll_ctl": 233,
    "open": 2,
    "close": 3,
    "shmdt": 67,
    "set_robust_list": 273,
    "mlock2": 325,
    "dup3": 292,
    "rt_tgsigqueueinfo": 297,
    "seccomp": 317,
    "userfaultfd": 323,
    "rseq": 334,
    "close_range": 436,
    "clone3": 435,
    "exit_group": 231,
    "waitid": 247,
    "restart_syscall": 219,
    "nanosleep": 35,
    "clock_nanosleep": 230,
    "poll": 7,
    "futex": 202,
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "epoll_pwait2": 441,
}
SLEEPS_OF_EPOLL = {SYS["epoll_wait"], SYS["epoll_pwait"], SYS["epoll_pwait2"]}

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


def interrupted_epoll(registers: Registers) -> bool:
    """epoll_wait gives EINTR even for a mere freeze, since it has no restart (fs/eventpoll.c)."""
    return registers.orig_ax in SLEEPS_OF_EPOLL and registers.ax == MASK64 - EINTR + 1


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


def rewind(registers: Registers) -> Registers:
    """Registers that make the interrupted call again when the thread runs."""
    return registers._replace(
        ax=registers.orig_ax, ip=registers.ip - len(SYSCALL_INSTRUCTION), orig_ax=MASK64
    )


def calling(registers: Registers, ip: int, sp: int, nr: int, args: tuple[int, ...]) -> Registers:
    """Registers that make one system call at the `syscall` instruction `ip`; segments are kept from `registers`."""
    di, si, dx, r10, r8, r9 = (*(arg & MASK64 for arg in args), 0, 0, 0, 0, 0, 0)[:6]
    return registers._replace(ip=ip, sp=sp, ax=nr, orig_ax=MASK64, di=di, si=si, dx=dx, r10=r10, r8=r8, r9=r9)
