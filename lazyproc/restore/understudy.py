"""A tree of our own making: two threads, a file, a pipe, and memory of the kinds that nearly every process has; and a
connection, for trees that have some.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys
import time
from collections.abc import Sequence

from lazyproc import model
from lazyproc.kernel import proc, tcp
from lazyproc.kernel.sockopt import SO_REUSEADDR, SOL_SOCKET, TCP_ESTABLISHED
from lazyproc.kernel.tracee import xsave_size
from lazyproc.model import PAGE, Checkpoint, MemoryObject, ObjectKind, OpenFile, Owner, Vma, VmaKind

ROOT, OTHER = 2, 3  # numbers in a pid namespace of its own
TEXT, HEAP, STACK = 0x400000, 0x600000, 0x800000
LENGTH = 16 * PAGE  # of each
EXE, HERE, READING, WRITING, ONE_END, OTHER_END, WATCHING = 1, 2, 3, 4, 5, 6, 7  # files
RSEQ_BYTES, RSEQ_SIGNATURE, ROBUST_BYTES = 32, 0x53053053, 24
CS, SS, FLAGS = 0x33, 0x2B, 0x202  # of user code
VDSO = {"[vdso]": VmaKind.VDSO, "[vvar]": VmaKind.VVAR, "[vvar_vclock]": VmaKind.VVAR_VCLOCK}


def understudy(*, connected: bool = False) -> Checkpoint:
    """Its memory is zeros. It can be built where we can build any; `connected`, any with TCP connections."""
    now = time.monotonic_ns()
    files = [*_files(), *(_connection() if connected else ())]
    extents = (model.Extent(HEAP, 2, lazy=True), model.Extent(STACK, 2, lazy=False))
    return Checkpoint(
        tasks=(_task(files),),
        files={file.id: file for file in files},
        pipes={1: model.Pipe(1, 1 << 16, b"0")},
        shared={},
        contents={},
        memory={MemoryObject(ObjectKind.TASK, ROOT): extents},
        clocks=model.Clocks(now, now, time.time_ns()),
    )


def _task(files: Sequence[OpenFile]) -> model.Task:
    limits = proc.limits(proc.read(os.getpid(), "limits"))
    return model.Task(
        ROOT, 0, ROOT, ROOT, model.TaskState.ALIVE, "understudy",
        threads=tuple(map(_thread, (ROOT, OTHER))),
        mm=_mm(),
        fs=model.Fs(HERE, HERE, 0o022),
        descriptors=tuple(
            model.Descriptor(file.id, file.id, file.id % 2 == 0) for file in files if file.id != HERE
        ),
        sigactions=(model.SigAction(15, TEXT, 0, 0, 0),),
        limits=tuple(model.Limit(number, *limit) for number, limit in enumerate(limits)),
    )  # fmt: skip


def _thread(tid: int) -> model.Thread:
    blank = model.Registers(*bytes(len(model.Registers._fields)))
    status = proc.status(proc.read(os.getpid(), "status"))
    return model.Thread(
        tid, "understudy", blank._replace(ip=TEXT, sp=STACK + LENGTH, cs=CS, ss=SS, flags=FLAGS),
        xsave=bytes(xsave_size()),
        blocked=0,
        pending=(),
        altstack=model.SignalStack(STACK, 0, LENGTH // 2),
        clear_child_tid=STACK,
        robust_list=STACK,
        robust_list_len=ROBUST_BYTES,
        rseq=model.Rseq(STACK + PAGE, RSEQ_BYTES, RSEQ_SIGNATURE),
        credentials=model.Credentials(
            *status.uid, *status.gid, status.groups,
            status.cap_inheritable, status.cap_permitted, status.cap_effective, status.cap_bounding,
            status.cap_ambient, 0, status.no_new_privs,
        ),
        scheduling=model.Scheduling(os.SCHED_OTHER, 0, 0),
        pdeath_signal=0,
        timer_slack_ns=50_000,
        seccomp_mode=0,
        seccomp=(),
    )  # fmt: skip


def _mm() -> model.Mm:
    anonymous, private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_PRIVATE
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    return model.Mm(
        TEXT, TEXT + LENGTH, HEAP, HEAP + LENGTH, HEAP, HEAP + LENGTH, STACK + LENGTH // 2,
        STACK, STACK + PAGE, STACK + PAGE, STACK + 2 * PAGE,
        auxv=proc.auxv(proc.read(os.getpid(), "auxv")),
        exe_id=EXE,
        dumpable=1,
        vmas=(
            Vma(TEXT, TEXT + LENGTH, mmap.PROT_READ | mmap.PROT_EXEC, private, VmaKind.FILE, file_id=EXE),
            Vma(HEAP, HEAP + LENGTH, writable, anonymous, VmaKind.ANON, name="[heap]"),
            Vma(STACK, STACK + LENGTH, writable, anonymous, VmaKind.ANON, name="[stack]"),
            *_vdso(),
        ),
    )  # fmt: skip


def _vdso() -> list[Vma]:
    """Where our own is, it can be put."""
    ours = proc.maps(proc.read(os.getpid(), "maps"))
    prot = mmap.PROT_READ | mmap.PROT_EXEC
    return [Vma(m.start, m.end, prot, mmap.MAP_PRIVATE, VDSO[m.path]) for m in ours if m.path in VDSO]


def _files() -> list[OpenFile]:
    exe, root = os.path.realpath(sys.executable), "/"
    resources: list[tuple[int, int, model.Resource]] = [
        (EXE, os.O_RDONLY, model.RegularFile(exe, os.stat(exe).st_mode, os.stat(exe).st_size)),
        (HERE, os.O_RDONLY | os.O_DIRECTORY, model.RegularFile(root, os.stat(root).st_mode)),
        (READING, os.O_RDONLY, model.PipeEnd(1)),
        (WRITING, os.O_WRONLY, model.PipeEnd(1)),
    ]
    return [OpenFile(number, flags, 0, Owner(), resource) for number, flags, resource in resources]


def _connection() -> list[OpenFile]:
    """To itself, at an address that is this process's alone and ports that nobody uses: it is made in repair mode and
    goes again without a packet.
    """
    host = bytes((127, 108, *(os.getpid() % (1 << 16)).to_bytes(2, "big")))
    ends = ((ONE_END, (host, 1), (host, 2)), (OTHER_END, (host, 2), (host, 1)))
    sockets = [OpenFile(number, os.O_RDWR, 0, Owner(), _end(number, *pair)) for number, *pair in ends]
    watching = model.Epoll((model.EpollTarget(ONE_END, ONE_END, select.EPOLLIN, ONE_END),))
    return [*sockets, OpenFile(WATCHING, os.O_RDWR, 0, Owner(), watching)]


def _end(inode: int, local: tuple[bytes, int], remote: tuple[bytes, int]) -> model.InetSocket:
    options = model.SocketOptions({(SOL_SOCKET, SO_REUSEADDR): (1).to_bytes(4, sys.byteorder)})
    window = tcp.WINDOW.pack(1, PAGE, PAGE, PAGE, 1)
    state = model.TcpState(1, 1, b"", b"", 0, PAGE, tcp.OPT_TIMESTAMPS | tcp.OPT_SACK, 0, 0, 0, window)
    return model.InetSocket(
        inode, socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, TCP_ESTABLISHED, local, remote,
        backlog=0,
        shutdown=0,
        options=options,
        tcp=state,
    )  # fmt: skip
