"""Checkpoints of the real CRIU are read, and CRIU reads and restores what lazyproc writes of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazyproc.errors import ImageError
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.draft import filled
from lazyproc.images.files import EXTRAS, SUMS, Folder, kind_of
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Epoll,
    EventFd,
    InetSocket,
    MemFd,
    OpenFile,
    PipeEnd,
    RegularFile,
    SharedKind,
    TaskState,
    TimerFd,
    UnixSocket,
    VmaKind,
)
from lazyproc.pages.images import ImagePages, write_pages
from tests import peer
from tests.interop.both_ways import tree
from tests.needs import require_root

# Holds one thing of each kind, each at a descriptor of its own, and answers a signal with what it finds in them.
_CARGO = r"""
import ctypes, mmap, os, select, signal, socket, sys, threading
ready, answer, scratch = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def at(fd, old):
    os.dup2(old, fd); os.close(old)
r, w = os.pipe(); at(100, r); at(101, w); os.write(101, b"in the pipe")
a, b = socket.socketpair(); at(102, a.detach()); at(103, b.detach()); os.write(102, b"in the socket")
at(104, os.eventfd(7))
at(106, os.open(scratch, os.O_RDWR | os.O_CREAT)); os.write(106, b"deleted file"); os.unlink(scratch)
at(107, os.memfd_create("cargo")); os.ftruncate(107, 5 * 4096); os.pwrite(107, b"in the memfd", 4096)
libc = ctypes.CDLL(None, use_errno=True)
at(108, libc.timerfd_create(1, 0))
libc.timerfd_settime(108, 0, (ctypes.c_long * 4)(5, 0, 1000, 0), None)
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(3); at(109, s.detach())
e = select.epoll(); at(105, e.fileno()); e = select.epoll.fromfd(105); e.register(100, select.EPOLLIN, )
shared = mmap.mmap(-1, 8 * 4096); shared[4096:4106] = b"anonymous!"
private = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, 64, 2):
    private[page * 4096] = page + 1
# Blocked and waited for: a handler of Python's could be due just when pause() begins.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
done = threading.Event()
def report(*_):
    fd = os.open(answer, os.O_WRONLY)
    pages = bytes(private[page * 4096] for page in range(64))
    os.write(fd, b"|".join([os.read(100, 99), os.read(103, 99), os.read(104, 8), os.pread(106, 99, 0),
        os.pread(107, 12, 4096), shared[4096:4106], pages]))
signal.signal(signal.SIGUSR1, report)
threading.Thread(target=done.wait, daemon=True).start()
if os.fork() == 0:
    while True: signal.pause()
if os.fork() == 0: os._exit(3)
os.write(ready, b"x"); os.close(ready)
signal.sigwait([signal.SIGUSR1])
report()
os._exit(0)
"""
_EXPECTED = [
    b"in the pipe",
    b"in the socket",
    (7).to_bytes(8, "little"),
    b"deleted file",
    b"in the memfd",
    b"anonymous!",
    bytes(0 if page % 2 else page + 1 for page in range(64)),
]


@dataclass(frozen=True)
class Dumped:
    folder: Folder
    checkpoint: Checkpoint
    answer: Path

    def file(self, fd: int) -> OpenFile:
        """What the root has open at `fd`."""
        numbers = {item.fd: item.file_id for item in self.checkpoint.root.descriptors}
        return self.checkpoint.files[numbers[fd]]


@pytest.fixture
def dumped(tmp_path: Path) -> Iterator[Dumped]:
    """A tree of three processes, dumped by CRIU."""
    require_root()
    answer, folder = tmp_path / "answer", Folder(tmp_path / "dump")
    os.mkfifo(answer)
    folder.path.mkdir()
    ready, theirs = os.pipe()
    cargo = subprocess.Popen(
        [sys.executable, "-I", "-c", _CARGO, str(theirs), str(answer), str(tmp_path / "scratch")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=[theirs], start_new_session=True, cwd="/",
    )  # fmt: skip
    try:
        os.close(theirs)
        assert os.read(ready, 1) == b"x"
        _criu("dump", folder, "--tree", str(cargo.pid))
        cargo.wait()
        checkpoint = from_images(folder.read())
        # CRIU killed the tree, and its orphans are ours: until they are waited for, their pids are taken.
        for task in checkpoint.tasks[1:]:
            os.waitpid(task.vpid, 0)
        yield Dumped(folder, checkpoint, answer)
    finally:
        os.close(ready)
        for pid in tree(cargo.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cargo.wait()


def _criu(action: str, folder: Folder, *options: str) -> None:
    log = folder.path / f"{action}.log"
    command = [
        *peer.criu(),
        action,
        "--no-default-config",
        "-D",
        str(folder.path),
        "-o",
        log.name,
        "-v4",
        *options,
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    errors = [line for line in log.read_text().splitlines() if "Error" in line] if log.exists() else []
    assert result.returncode == 0, "\n".join([result.stdout, result.stderr, *errors])


def test_a_dump_of_criu_is_read(dumped: Dumped) -> None:
    root, child, zombie = dumped.checkpoint.tasks
    assert (root.ppid, child.ppid, zombie.ppid) == (0, root.vpid, root.vpid)
    assert (zombie.state, zombie.exit_code, zombie.threads) == (TaskState.ZOMBIE, 3 << 8, ())
    assert len(root.threads) == 2
    assert signal.SIGUSR1 in [action.signal for action in root.sigactions if action.handler > 1]
    assert root.mm is not None
    for task in (root, child):
        assert task.mm is not None
        ip, sp = task.leader.registers.ip, task.leader.registers.sp
        code = next(vma for vma in task.mm.vmas if vma.start <= ip < vma.end)
        stack = next(vma for vma in task.mm.vmas if vma.start <= sp < vma.end)
        assert code.kind is VmaKind.FILE
        assert code.prot & 4
        assert "libc" in _path(dumped.checkpoint.files[code.file_id])
        assert stack.name == "[stack]"
        assert task.leader.credentials.uid == os.getuid()
        assert len(task.limits) == 16
    names = {vma.name for vma in root.mm.vmas} | {vma.kind.value for vma in root.mm.vmas}
    assert {"[heap]", "[stack]", "vdso", "vvar"} <= names
    assert os.path.realpath(sys.executable) == _path(dumped.checkpoint.files[root.mm.exe_id])
    build_id = _resource(dumped.checkpoint.files[root.mm.exe_id]).build_id
    assert build_id
    assert build_id in Path(sys.executable).read_bytes()


def _resource(file: OpenFile) -> RegularFile:
    assert isinstance(file.resource, RegularFile)
    return file.resource


def _path(file: OpenFile) -> str:
    return _resource(file).path


def test_every_descriptor_is_what_it_was(dumped: Dumped) -> None:
    checkpoint = dumped.checkpoint
    pipe = dumped.file(100).resource
    assert isinstance(pipe, PipeEnd)
    assert dumped.file(101).resource == pipe
    assert checkpoint.pipes[pipe.pipe_id].data == b"in the pipe"
    one, other = dumped.file(102).resource, dumped.file(103).resource
    assert isinstance(one, UnixSocket)
    assert isinstance(other, UnixSocket)
    assert (one.peer, other.peer) == (other.inode, one.inode)
    assert b"".join(packet.data for packet in other.queue) == b"in the socket"
    assert dumped.file(104).resource == EventFd(7, False)
    epoll = dumped.file(105).resource
    assert isinstance(epoll, Epoll)
    assert [(target.fd, target.file_id) for target in epoll.targets] == [(100, dumped.file(100).id)]
    deleted = _resource(dumped.file(106))
    content = checkpoint.contents[deleted.content_id]
    assert (content.data, content.path, stat.S_ISREG(content.mode)) == (((0, b"deleted file"),), "", True)
    timer = dumped.file(108).resource
    assert isinstance(timer, TimerFd)
    assert timer.interval_ns == 5 * 10**9
    assert 900 * 10**9 < timer.value_ns < 1000 * 10**9
    listener = dumped.file(109).resource
    assert isinstance(listener, InetSocket)
    assert (listener.state, listener.local[0], listener.backlog) == (10, bytes([127, 0, 0, 1]), 3)


def test_shared_memory_has_its_pages(dumped: Dumped) -> None:
    memfd = dumped.file(107).resource
    assert isinstance(memfd, MemFd)
    shared = dumped.checkpoint.shared
    assert (shared[memfd.object_id].name, shared[memfd.object_id].size) == ("cargo", 5 * PAGE)
    anonymous = next(memory for memory in shared.values() if memory.kind is SharedKind.ANON)
    assert anonymous.size == 8 * PAGE
    objects = {obj.id: obj for obj in dumped.checkpoint.memory}
    with ImagePages(dumped.folder, list(dumped.checkpoint.memory)) as pages:
        assert pages.read(objects[memfd.object_id], PAGE, 1)[:12] == b"in the memfd"
        assert pages.read(objects[anonymous.id], PAGE, 1)[:10] == b"anonymous!"


def _rewrite(dumped: Dumped, folder: Folder, *, extras: bool) -> None:
    """The checkpoint as lazyproc writes it, pages included."""
    with (
        filled(folder, early=True) as draft,
        ImagePages(dumped.folder, list(dumped.checkpoint.memory)) as pages,
    ):
        draft.write(to_images(dumped.checkpoint))
        write_pages(draft, dumped.checkpoint, pages)
    if not extras:
        folder.remove(EXTRAS)


def test_crit_reads_every_image_that_lazyproc_writes(dumped: Dumped, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "again")
    _rewrite(dumped, folder, extras=True)
    names = [name for name in folder.read() if name not in (EXTRAS, SUMS)]
    assert {kind_of(name) for name in names} >= {kind_of(name) for name in dumped.folder.read()}
    # One start of the interpreter for all: crit's own decoder, image by image.
    script = (
        "import sys, json, pycriu\n"
        "for path in sys.argv[1:]:\n"
        "    image = pycriu.images.load(open(path, 'rb'), pretty=True)\n"
        "    print(json.dumps([image['magic'], len(image['entries'])]))\n"
    )
    command = [*peer.pycriu_python(), "-c", script, *(str(folder.path / name) for name in names)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(names)
    counts = {name: json.loads(line) for name, line in zip(names, lines, strict=True)}
    assert counts["pstree.img"] == ["PSTREE", 3]
    assert counts["files.img"][1] >= len(dumped.checkpoint.files)


def test_what_was_changed_with_crit_is_taken_without_the_checksums(dumped: Dumped, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "again")
    _rewrite(dumped, folder, extras=True)
    name = f"core-{dumped.checkpoint.root.vpid}.img"
    script = (
        "import sys, pycriu\n"
        "image = pycriu.images.load(open(sys.argv[1], 'rb'))\n"
        "image['entries'][0]['tc']['comm'] = 'changed'\n"
        "pycriu.images.dump(image, open(sys.argv[1], 'r+b'))\n"
    )
    subprocess.run([*peer.pycriu_python(), "-c", script, str(folder.path / name)], check=True)
    with pytest.raises(ImageError, match=f"{name}: is not what was written .* remove {SUMS}"):
        from_images(folder.read())
    folder.remove(SUMS)
    assert from_images(folder.read()).root.comm == "changed"


def test_what_lazyproc_writes_reads_the_same(dumped: Dumped, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "again")
    _rewrite(dumped, folder, extras=True)
    assert from_images(folder.read()) == dumped.checkpoint


@pytest.mark.parametrize("extras", [True, False], ids=["with lazyproc.img", "without"])
def test_criu_restores_what_lazyproc_writes(dumped: Dumped, tmp_path: Path, extras: bool) -> None:
    folder = Folder(tmp_path / "again")
    _rewrite(dumped, folder, extras=extras)
    pid = dumped.checkpoint.root.vpid
    child = dumped.checkpoint.tasks[1].vpid
    try:
        _criu("restore", folder, "--restore-detached")
        os.kill(pid, signal.SIGUSR1)
        with open(dumped.answer, "rb", buffering=0) as answer:
            assert answer.read(4096).split(b"|") == _EXPECTED
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        for left in (pid, child):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(left, signal.SIGKILL)
                os.waitpid(left, 0)


def test_a_resource_without_a_home_is_refused_by_name(dumped: Dumped) -> None:
    images = dumped.folder.read()
    images["filelocks.img"] = bytes.fromhex("1943565416363254") + bytes(4)
    with pytest.raises(ImageError, match="filelocks"):
        from_images(images)
