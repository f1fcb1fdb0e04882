"""A QEMU without a guest, made ready before the guest is stopped elsewhere: its RAM is userfaultfd-backed and empty."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from lazyproc.errors import ConnectionLost, HostLacks, LazyprocError, NoSuchProcess, Obstacle, RestoreError
from lazyproc.events import Listener
from lazyproc.facts import dataclass
from lazyproc.kernel import family, proc
from lazyproc.kernel.fds import make_room
from lazyproc.kernel.remote import Stub
from lazyproc.kernel.sys import pidfd_getfd
from lazyproc.kernel.visit import call_in, visiting
from lazyproc.qemu.command import demand_own_paths
from lazyproc.qemu.disks import out_of_reach
from lazyproc.qemu.files import files, in_common
from lazyproc.qemu.guest import Plugged, machine_of, misplaced, plugged
from lazyproc.qemu.qmp import Qmp
from lazyproc.qemu.ram import Block, blocks, differences, rows
from lazyproc.restore.anchoring import plant
from lazyproc.restore.groups import joined
from lazyproc.restore.lazy import watch_removals
from lazyproc.restore.lazytree import LazyTask, LazyTree
from lazyproc.restore.pages import O_NONBLOCK_CLOEXEC, read_only
from lazyproc.uffd.device import USERFAULTFD_IOC_NEW, Userfaultfd, opened_device
from lazyproc.uffd.pager import Pager, register_regions

START_S = 20.0
LOAD_S = 30.0
POLL_S = 0.05
FD_NAME = "lazyproc"
ABOVE = 64  # numbers that QEMU may take for itself before it meets an anchor
ANCHORED = 256  # descriptors for which it has room
CAPABILITIES = ("late-block-activate", "events")


@dataclass(slots=True)
class Shell:
    """`blocks` in the order of the source's, each with its place here."""

    process: subprocess.Popen[bytes]
    qmp: Qmp
    groups: Sequence[str]
    device: int | None  # its descriptor of /dev/userfaultfd
    blocks: Sequence[Block] = ()
    spared: bool = False  # it goes on without us

    @property
    def pid(self) -> int:
        return self.process.pid

    def compare(
        self,
        machine: str,
        theirs: Sequence[Block],
        their_files: Mapping[str, Sequence[object]],
        their_plugged: Plugged,
    ) -> tuple[Obstacle, ...]:
        """What of the guest does not fit in here; when all does, its blocks are known. Raises HostLacks."""
        here = blocks(self.pid, rows(self.qmp.hmp("info ramblock")))
        own = machine_of(self.qmp)
        if own != machine:
            why = f"the QEMU there is a {own}, that of the guest a {machine}"
            return (Obstacle(0, "host", why, f"start it there with -machine {machine}"),)
        places = {each.name: each.addr for each in here}
        same = in_common(files(self.pid, here), their_files)
        others = (*same, *_locked(self.pid), *out_of_reach(self.qmp, self.pid))
        elsewhere = misplaced(plugged(self.qmp), their_plugged)
        if found := (*differences(here, theirs), *elsewhere, *others):
            return found
        self.blocks = [Block.of(each.number, each.row(), places[each.name]) for each in theirs]
        return ()

    def arm(self, pager: Pager, listener: Listener) -> LazyTree:
        """Its RAM, which was compared, is emptied, and the pager's from now on."""
        fd = self._registered()
        space = pager.add_space(fd, self.pid, self.pid)
        pager.add_regions(space, self._rows())
        if any(each.shared for each in self.blocks):
            watch_removals(pager, listener)
        tree = self._tree(pager.cradle)
        with read_only(pager.ledger) as ledger:
            plant(tree.tasks[0], (fd, ledger, pager.cradle))
        return tree

    def _registered(self) -> int:
        """Its userfaultfd. While the first thread stands still nobody else looks at the RAM, as the display would, and
        a page of zeros that it left there would never be replaced.
        """
        pidfd = os.pidfd_open(self.pid)
        try:
            with visiting(self.pid) as (stub, _):
                number = self._userfaultfd(stub)
                fd = pidfd_getfd(pidfd, number)
                stub.call("close", number)
                Userfaultfd.from_fd(fd).api()
                for each in self.blocks:
                    advice = mmap.MADV_REMOVE if each.shared else mmap.MADV_DONTNEED
                    stub.call("madvise", each.addr, each.used, advice)
                self._register(fd)
                return fd
        finally:
            os.close(pidfd)

    def _register(self, fd: int) -> None:
        try:
            register_regions(fd, self._rows())
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise HostLacks(  # vma_can_userfault(): anonymous memory, shmem, huge pages
                "its RAM is in files of a filesystem whose pages cannot be brought later",
                where=f"QEMU of pid {self.pid}",
                remedy="use memory-backend-memfd, or a mem-path in a tmpfs, at both ends",
            ) from error

    def _userfaultfd(self, stub: Stub) -> int:
        """One that sees the kernel's faults as well: a QEMU that has dropped its rights (-runas) gets it from the
        device alone, which is not left to it.
        """
        if self.device is None:
            return stub.call("userfaultfd", O_NONBLOCK_CLOEXEC)
        try:
            return stub.call("ioctl", self.device, USERFAULTFD_IOC_NEW, O_NONBLOCK_CLOEXEC)
        finally:
            stub.call("close", self.device)
            self.device = None

    def _rows(self) -> array[int]:
        """As the pager takes regions."""
        return array("Q", (n for each in self.blocks for n in (each.addr, each.used, each.object.key, 0)))

    def _tree(self, cradle: int) -> LazyTree:
        lowest = max(proc.descriptor_numbers(self.pid)) + ABOVE
        started = proc.stat(proc.read(self.pid, "stat")).start_time
        task = LazyTask(self.pid, self.pid, started, lowest, lowest + 1, lowest + 2)
        return LazyTree(self.pid, self.pid, 0, (task,), (), tuple(self.groups), os.fstat(cradle).st_ino)

    def load(self, devices: bytes, disturbed: Callable[[], bool]) -> None:
        """The state of the guest, which stands still afterwards: its pages come while it is read. Returns early when
        `disturbed`. Raises RestoreError.
        """
        try:
            self._give(devices)
            self.qmp.execute("migrate-incoming", {"uri": f"fd:{FD_NAME}"})
            self._await_loaded(disturbed)
        except ConnectionLost as error:
            raise RestoreError(
                "QEMU has ended while it took the guest in",
                where=f"pid {self.pid}",
                remedy="see what it said where `receive` runs: machine and devices must be those of the source",
            ) from error

    def _give(self, devices: bytes) -> None:
        """QEMU has them as a file that is open."""
        with open(os.memfd_create("lazyproc-devices", os.MFD_CLOEXEC), "wb") as file:
            file.write(devices)
            file.seek(0)
            self.qmp.execute("getfd", {"fdname": FD_NAME}, fds=[file.fileno()])

    def _await_loaded(self, disturbed: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LOAD_S
        while time.monotonic() < deadline and not disturbed():
            try:
                status = self.qmp.event("MIGRATION", timeout=POLL_S)["data"]["status"]
            except TimeoutError:
                continue
            if status == "completed":
                return
            if status == "failed":
                raise ConnectionLost("it has failed")
        if time.monotonic() >= deadline:
            raise RestoreError(f"the guest was not taken in within {LOAD_S:.0f} s", where=f"pid {self.pid}")

    def demand_there(self) -> None:
        """Raises NoSuchProcess when somebody has ended it: its first thread is a zombie before all others are gone."""
        if self.process.poll() is not None or proc.status(proc.read(self.pid, "status")).state in "ZX":
            raise NoSuchProcess("QEMU has ended with the guest that it had loaded", where=f"pid {self.pid}")

    def end_with_us(self) -> None:
        """A QEMU that has dropped its rights has dropped this too (prctl(2), PR_SET_PDEATHSIG)."""
        call_in(self.pid, "prctl", family.PR_SET_PDEATHSIG, signal.SIGKILL)

    def outlive_us(self) -> None:
        """From here on it is never killed for our sake."""
        self.spared = True
        with suppress(NoSuchProcess):  # somebody has ended it
            call_in(self.pid, "prctl", family.PR_SET_PDEATHSIG, 0)

    def run(self) -> None:
        """The guest goes on."""
        self.qmp.execute("cont")


def run_instead(pid: int, monitor: int) -> Qmp:
    """The guest is told to go on, since its keeper may have been killed before it had. `monitor` is the descriptor of
    that one. QEMU answers when the pages are there that it needs for that. Raises ConnectionLost.
    """
    qmp = Qmp.inherited(socket.socket(fileno=os.dup(monitor)), f"the monitor of pid {pid}")
    qmp.ask("cont")  # it is no error when it runs already
    return qmp


def _locked(pid: int) -> Iterator[Obstacle]:
    """What mlock(2) holds is there already and stays (madvise(2), EINVAL): no page of it could come later."""
    if proc.status(proc.read(pid, "status")).locked_kib:
        yield Obstacle(
            0,
            "host",
            "the QEMU there has locked its memory, so that no page of the guest is missing",
            "start it there without -overcommit mem-lock=on",
        )


@contextmanager
def empty_shell(
    command: Sequence[str], cgroup: str | None, outputs: Sequence[int], listener: Listener
) -> Iterator[Callable[[], Shell]]:
    """QEMU by its command line, which has been started; killed at the end unless it is spared. What is given waits
    until it is ready for a guest that is not to run yet.

    `outputs` are descriptors for its standard output and error. Both raise RestoreError when it does not start.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    monitor = f"socket,id=lazyproc,fd={theirs.fileno()}"
    words = (
        *command,
        "-incoming",
        "defer",
        "-S",
        "-chardev",
        monitor,
        "-mon",
        "chardev=lazyproc,mode=control",
    )
    with ExitStack() as stack:
        device = opened_device()
        if device is not None:
            stack.callback(os.close, device)
        stack.callback(ours.close)
        try:
            demand_own_paths(command)
            process = _started(words, theirs, device, outputs)
        except OSError as error:
            raise RestoreError(f"cannot be started ({error.strerror})", where=command[0]) from error
        finally:
            theirs.close()
        shells: list[Shell] = []
        try:
            groups = stack.enter_context(joined(process.pid, cgroup, listener))

            def ready() -> Shell:
                shell = Shell(process, _greeted(ours, process), groups, device)
                shells.append(shell)
                shell.end_with_us()
                wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
                shell.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
                return shell

            yield ready
        finally:
            if not any(shell.spared for shell in shells):
                process.kill()
                process.wait()


def _started(
    words: Sequence[str], monitor: socket.socket, device: int | None, outputs: Sequence[int]
) -> subprocess.Popen[bytes]:
    out, err = outputs or (subprocess.DEVNULL, subprocess.DEVNULL)
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        pass_fds=[monitor.fileno(), *([] if device is None else [device])],
        start_new_session=True,
        preexec_fn=partial(_newborn, os.getpid()),
    )


def _newborn(parent: int) -> None:
    """Its table is large enough for our anchors before it has threads, and would have to wait for every processor."""
    family.end_with_parent(parent)
    make_room(ANCHORED)


def _greeted(sock: socket.socket, process: subprocess.Popen[bytes]) -> Qmp:
    try:
        return Qmp.over(sock, "the monitor of QEMU here", timeout=START_S)
    except (LazyprocError, TimeoutError) as error:
        status = process.poll()
        raise RestoreError(
            f"QEMU does not start ({error if status is None else f'exit status {status}'})",
            where=f"pid {process.pid}",
            remedy="see what it said where `receive` runs",
        ) from error
