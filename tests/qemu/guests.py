"""QEMU guests that check their memory, and what they say on their serial line while they are moved.

The serial line is a file to which every QEMU appends: a guest that goes on in another one goes on in the same line. A
beat is stamped when it is written.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest

from lazyproc.errors import UsageError
from lazyproc.facts import dataclass
from lazyproc.hosts import Host
from lazyproc.kernel.fds import inotify_add_watch, inotify_init
from lazyproc.qemu.qmp import Qmp
from tests.needs import require
from tests.qemu.kernel import boot, mini

AS_NOBODY = ("-runas", "nobody")
SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")  # libvirt's
BEAT_S = 0.005  # between two beats of a guest that nothing holds up
START_S = 30.0
_PIECE = 1 << 16  # bytes that are read at once
_IN_MODIFY = 2
_BEAT = re.compile(rb"beat (\d+) (\d+) (\d+) (\d+)\r?")
# What a kernel does at its start that costs a guest of ours time and gives it nothing.
_KERNEL = (
    "console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on"
)


needs_kvm = pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="this machine has no KVM")


@dataclass(frozen=True, slots=True)
class Shape:
    """A guest. Two QEMUs of one shape can hand their guest to each other."""

    machine: str = "pc"  # or q35
    memory: int = 128  # MiB
    cpus: int = 1
    shared: bool = False  # RAM in a memfd
    slots: bool = False  # for memory that is plugged
    disk: Path | None = None  # a raw image, which the guest writes and reads back
    net: bool = False  # user networking
    kvm: bool = False  # for which there is a guest without Linux, disk and network, of one CPU (mini.c)
    visited: int = 32  # MiB
    rate: int = 2000  # visits a second; 0, or kvm: as many as can be
    options: tuple[str, ...] = ()  # what else its QEMU is given

    def command(self, serial: Path, qmp: Path, *more: str) -> list[str]:
        """The command line of a QEMU whose guest beats into the file `serial` and whose monitor listens at `qmp`."""
        words = [
            str(require("qemu-system-x86_64")),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-smp", str(self.cpus), "-m", f"{self.memory}{',slots=4,maxmem=2G' if self.slots else ''}"),
            *(self._small() if self.kvm else self._linux()),
            *("-chardev", f"file,id=serial,path={serial},append=on", "-serial", "chardev:serial"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
        ]
        machine = self.machine
        if self.shared:
            machine += ",memory-backend=ram"
            words += ["-object", f"memory-backend-memfd,id=ram,size={self.memory}M,share=on"]
        if self.disk is not None:
            words += ["-drive", f"if=none,id=disk,file={self.disk},format=raw,cache=none,aio=threads"]
            words += ["-device", "virtio-blk-pci,drive=disk"]
        if self.net:
            words += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        return [*words, "-machine", machine, *self.options, *more]

    def _linux(self) -> list[str]:
        files = boot()
        options = f"wmb={self.visited} rate={self.rate} visitors={self.cpus}"
        devices = f"disk={int(self.disk is not None)} net={int(self.net)}"
        words = ["-accel", "tcg", "-cpu", "max", "-append", f"{_KERNEL} {options} {devices}"]
        return [*words, "-kernel", str(files.kernel), "-initrd", str(files.initramfs)]

    def _small(self) -> list[str]:
        return ["-accel", "kvm", "-kernel", str(mini()), "-append", f"wmb={self.visited}"]


@dataclass(frozen=True, slots=True)
class Beat:
    """A line of a guest. `at`: when it was written, by time.monotonic(); the other numbers since the guest's start."""

    at: float
    number: int
    visits: int
    bad: int  # pages and blocks with wrong contents
    blocks: int  # of the disk, written and read back


class Serial:
    """The file at `path`, and the beats that were written to it so far. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb+", buffering=0)
        self._stop = os.eventfd(0)
        self._beats: list[Beat] = []
        self._other: list[bytes] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="serial")

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self._stop, 1)
        self._reader.join()
        os.close(self._stop)
        self._file.close()
        self.path.unlink()

    def _read(self) -> None:
        rest = b""
        with _watching(self.path) as watch:
            while True:
                while data := self._file.read(_PIECE):
                    at = time.monotonic()
                    *lines, rest = (rest + data).split(b"\n")
                    with self._news:
                        for line in lines:
                            self._take(line, at)
                        self._news.notify_all()
                ready, _, _ = select.select([watch, self._stop], [], [])
                if self._stop in ready:
                    return
                os.read(watch, _PIECE)

    def _take(self, line: bytes, at: float) -> None:
        found = _BEAT.fullmatch(line)
        if found is None:
            self._other.append(line)
        else:
            self._beats.append(Beat(at, *map(int, found.groups())))

    def beats(self) -> list[Beat]:
        with self._news:
            return list(self._beats)

    def wait(self, count: int = 1, deadline_s: float = START_S, ended: Callable[[], bool] = bool) -> Beat:
        """The last beat, once `count` more have come. AssertionError when they do not in time, or QEMU has `ended`."""
        with self._news:
            wanted, until = len(self._beats) + count, time.monotonic() + deadline_s
            while len(self._beats) < wanted:
                assert not ended(), f"QEMU has ended; the guest said {self._said()}"
                assert time.monotonic() < until, (
                    f"no {count} beats in {deadline_s} s; the guest said {self._said()}"
                )
                self._news.wait(0.2)
            return self._beats[-1]

    def check(self) -> list[Beat]:
        """All beats: none missing, none twice, nothing between them, no wrong page in any."""
        beats = self.beats()
        assert beats, "the guest has not begun to beat"
        numbers = [beat.number for beat in beats]
        torn = [(a, b) for a, b in pairwise(numbers) if b != a + 1]
        assert not torn, f"beats are missing or come twice: {torn[:3]}; the guest said {self._said()}"
        assert beats[-1].bad == 0, (
            f"{beats[-1].bad} pages or blocks with wrong contents by beat {numbers[-1]}"
        )
        return beats

    def _said(self) -> str:
        """What was no beat, which the kernel says when it dies."""
        return b"\n".join(self._other[-20:]).decode(errors="replace") or "nothing else"


@contextmanager
def _watching(path: Path) -> Iterator[int]:
    """A descriptor that is readable once somebody has written to the file (inotify(7))."""
    watch = inotify_init(os.O_CLOEXEC)
    try:
        inotify_add_watch(watch, str(path), _IN_MODIFY)
        yield watch
    finally:
        os.close(watch)


def longest_gap(beats: Sequence[Beat], since: float = 0.0) -> float:
    """Seconds without a beat, at most, between beats of which the second came after `since`."""
    return max(b.at - a.at for a, b in pairwise(beats) if b.at > since)


@dataclass(frozen=True, slots=True)
class Guest:
    """A running QEMU whose guest beats. `pid` and `qmp`, where its monitor listens, as the caller sees them; `inside`:
    the same path for commands on its host.
    """

    process: subprocess.Popen[Any]
    shape: Shape
    serial: Serial
    qmp: Path
    inside: Path
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid


def empty_disk(folder: Path) -> Path:
    """A raw image of 1 MiB."""
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    return image


def monitor(guest: Guest) -> Qmp:
    """Its QMP monitor, as soon as it listens, to the millisecond."""
    until = time.monotonic() + START_S
    while True:
        with suppress(UsageError):
            return Qmp(str(guest.qmp))
        assert guest.process.poll() is None, f"QEMU has ended: {guest.log.read_text()}"
        assert time.monotonic() < until, f"QEMU's monitor does not listen: {guest.log.read_text()}"
        time.sleep(0.001)


@contextmanager
def started(
    shape: Shape,
    serial: Serial,
    folder: Path,
    *more: str,
    host: Host | None = None,
    file: Path | None = None,
) -> Iterator[Guest]:
    """A QEMU of this shape, its monitor and log in `folder` or in the host's own; killed at the end. It may not beat
    yet, or wait for a guest to come in (`more`: options). The guest is that `saved` in the file, if there is one.
    """
    own, inside = (host.outside, host.scratch / "qmp") if host else (folder, folder / "qmp")
    qmp, log = own / "qmp", own / "qemu.log"
    incoming = ("-incoming", "fd:0") if file is not None else ()
    with log.open("w") as output, (file or Path(os.devnull)).open("rb") as stdin:
        process = (host.popen if host else subprocess.Popen)(
            shape.command(serial.path, inside, *incoming, *more),
            stdin=stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield Guest(process, shape, serial, qmp, inside, log)
    finally:
        process.kill()
        process.wait()
        qmp.unlink(missing_ok=True)


@contextmanager
def beating(
    shape: Shape, folder: Path, *more: str, host: Host | None = None, file: Path | None = None
) -> Iterator[Guest]:
    """A guest on a serial line of its own that beats already."""
    with (
        Serial(folder / "serial") as serial,
        started(shape, serial, folder, *more, host=host, file=file) as guest,
    ):
        try:
            serial.wait(ended=lambda: guest.process.poll() is not None)
        except AssertionError as error:
            raise AssertionError(f"{error}; QEMU said {guest.log.read_text()!r}") from None
        yield guest


@contextmanager
def waiting(
    shape: Shape, serial: Serial, folder: Path, *more: str, capabilities: Sequence[str] = (), tls: str = ""
) -> Iterator[tuple[Guest, str]]:
    """A QEMU that waits for post-copy, and where: with the credentials `tls` on TCP."""
    folder.mkdir()
    where = "tcp:127.0.0.1:0" if tls else f"unix:{folder / 'incoming'}"
    with started(shape, serial, folder, "-incoming", "defer", *more) as guest:
        with monitor(guest) as qmp:
            names = ("postcopy-ram", *capabilities)
            wanted = [{"capability": name, "state": True} for name in names]
            qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
            qmp.execute("migrate-set-parameters", {"tls-creds": tls})
            qmp.execute("migrate-incoming", {"uri": where})
            if tls:
                (address,) = qmp.execute("query-migrate")["socket-address"]
                where = f"127.0.0.1:{address['port']}"
        yield guest, where


def saved(shape: Shape, folder: Path) -> Path:
    """A guest that beats, in a file: taking it in takes less time than booting. It goes on on a new serial line."""
    file = folder / f"{shape.memory}-{shape.visited}.saved"
    with beating(shape, folder) as guest, monitor(guest) as qmp:
        qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
        qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        qmp.execute("migrate", {"uri": f"exec:cat > {file}"})
        while qmp.event("MIGRATION", timeout=START_S)["data"]["status"] != "completed":
            pass
    return file
