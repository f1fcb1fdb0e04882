"""A process that does to its memory what it is told, one JSON line a command, each in a thread of its own.

It is run by lazy_rig.py. A command that touches missing memory blocks in the kernel with the GIL released (ctypes),
so the next command still gets through.
"""

import ctypes
import hashlib
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

from lazyproc.model import PAGE
from lazyproc.uffd.device import PAGER_FEATURES, Feature, Userfaultfd

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = (ctypes.c_ssize_t,)
libc.vmsplice.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.write.argtypes = libc.read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)

PROT = 3  # PROT_READ | PROT_WRITE


def checked(result: int) -> int:
    if result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def do_mmap(length: int, shared: bool = False) -> int:
    return checked(libc.mmap(None, length, PROT, (1 if shared else 2) | 0x20, -1, 0))


def do_map_memfd(pid: int, fd: int, length: int) -> int:
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        return checked(libc.mmap(None, length, PROT, 1, opened, 0))
    finally:
        os.close(opened)


def do_register(ranges: list[tuple[int, int]], features: int = PAGER_FEATURES) -> int:
    uffd = Userfaultfd.open()
    uffd.api(Feature(features))
    for start, length in ranges:
        uffd.register(start, length)
    return uffd.detach()


def do_digest(addr: int, length: int) -> str:
    """Page after page: memcpy(3) goes through more of it in an order of its own."""
    copy = ctypes.create_string_buffer(length)
    start = ctypes.addressof(copy)
    for done in range(0, length, PAGE):
        libc.memcpy(start + done, addr + done, min(PAGE, length - done))
    return hashlib.sha256(copy.raw).hexdigest()


def do_poke(addr: int, text: str) -> None:
    libc.memcpy(addr, text.encode(), len(text))


def do_madvise(addr: int, length: int, advice: int) -> None:
    checked(libc.madvise(addr, length, advice))


def do_lock_when_touched(addr: int, length: int) -> None:
    checked(libc.mlock2(addr, length, 1))  # MLOCK_ONFAULT


def do_mremap(addr: int, old: int, new: int, flags: int, to: int = 0) -> int:
    return checked(libc.mremap(addr, old, new, flags, to))


def do_munmap(addr: int, length: int) -> None:
    checked(libc.munmap(addr, length))


def do_mprotect(addr: int, length: int, prot: int) -> None:
    checked(libc.mprotect(addr, length, prot))


def do_read_into(addr: int, text: str) -> int:
    """read(2) into memory that is missing: the kernel itself faults."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    got = checked(libc.read(reader, addr, len(text)))
    os.close(reader)
    os.close(writer)
    return got


def do_fork_digest(addr: int, length: int, advice: int | None = None) -> str:
    """As a child sees it, which gives that advice before."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if advice is not None:
            do_madvise(addr, length, advice)
        os.write(writer, do_digest(addr, length).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        digest = answers.read()
    os.waitpid(pid, 0)
    return digest


def do_digest_sealed(addr: int, length: int, path: str) -> str:
    """What O_DIRECT writes of it to a file: a device takes it from pinned pages."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    checked(libc.write(fd, addr, length))
    os.close(fd)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def do_digest_spliced(addr: int, length: int) -> str:
    """What vmsplice(2) puts into a pipe, by reference."""
    reader, writer = os.pipe()
    iovec = (ctypes.c_size_t * 2)(addr, length)
    checked(libc.vmsplice(writer, iovec, 1, 0))
    data = os.read(reader, length)
    os.close(reader)
    os.close(writer)
    return hashlib.sha256(data).hexdigest()


def do_spawn() -> int:
    """vfork(2) and exec, as posix_spawn(3) does it: the exit status."""
    return os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1]


def do_exec() -> None:
    os.execv("/bin/true", ["true"])


def do_sbrk(pages: int, top: int = 0) -> int:
    """The old end of the heap, which must be at `top` unless that is 0."""
    if top and libc.sbrk(0) != top:
        raise OSError(0, "somebody else has moved the heap's end")
    return checked(libc.sbrk(pages * 4096))


def do_abort(directory: str) -> None:
    """With a core file there."""
    os.chdir(directory)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.abort()


def do_close(fd: int) -> None:
    os.close(fd)


def do_exit() -> None:
    os._exit(0)


COMMANDS: dict[str, Callable[..., Any]] = {
    name.removeprefix("do_"): function for name, function in list(globals().items()) if name.startswith("do_")
}


def run(number: int, name: str, arguments: dict[str, Any]) -> None:
    try:
        answer: dict[str, Any] = {"result": COMMANDS[name](**arguments)}
    except Exception as error:
        answer = {"error": repr(error)}
    line = json.dumps({"number": number, **answer}) + "\n"
    os.write(1, line.encode())


def main() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        threading.Thread(
            target=run, args=(command["number"], command["name"], command["arguments"]), daemon=True
        ).start()
    os._exit(0)


if __name__ == "__main__":
    main()
