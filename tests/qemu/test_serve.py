"""A saved guest goes on at once in a QEMU as it comes from the distribution, and so does a running one."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lazyproc.cli.main import main
from lazyproc.errors import Parked
from lazyproc.events import Event, PagesMoved
from lazyproc.hosts import pair_of_hosts
from lazyproc.keys import make_keys
from lazyproc.migrate.guest_serve import qemu_serve
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.model import PAGE
from tests.live.moving import CLI
from tests.live.programs import wait_until
from tests.qemu.guests import Guest, Serial, Shape, beating, monitor, started, waiting

SMALL = Shape(memory=96, visited=16)


def lazyproc(*words: object, expected: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [*CLI, *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expected, f"exit {done.returncode}: {done.stderr}"
    return done


def answer(*words: object) -> Any:
    return json.loads(lazyproc(*words, "--json").stdout)


@contextmanager
def saved(shape: Shape, folder: Path) -> Iterator[tuple[Path, Serial]]:
    """A folder with a guest whose QEMU has ended, and the serial line on which it was heard last."""
    with beating(shape, folder) as guest:
        guest.serial.wait(20)
        report = answer("checkpoint", "--qemu", guest.qmp, "-D", folder / "images")
        assert report["pages_total"] > 0
        assert guest.process.wait(5) == 0
        yield folder / "images", guest.serial


def goes_on(serial: Serial) -> None:
    serial.wait(30)
    serial.check()


def test_a_saved_guest_goes_on(tmp_path: Path) -> None:
    with (
        saved(SMALL, tmp_path) as (images, serial),
        waiting(SMALL, serial, tmp_path / "there") as (_, where),
    ):
        assert "guest of a QEMU" in lazyproc("restore", "-D", images, expected=1).stderr
        assert "pc.ram" in lazyproc("show", images).stdout
        report = answer("qemu-serve", "-D", images, "--to", where)
        assert report["pages_urgent"] > 0
        goes_on(serial)


@pytest.mark.parametrize("where", ["127.0.0.1:1", "unix:/nowhere"])
def test_where_no_qemu_waits(where: str, tmp_path: Path) -> None:
    with beating(SMALL, tmp_path) as guest:
        refused = lazyproc("qemu-serve", guest.qmp, "--to", where, "--insecure", expected=1)
        assert "start QEMU with -incoming there" in refused.stderr
        goes_on(guest.serial)


def test_what_is_refused_leaves_the_qemu_that_waits(tmp_path: Path) -> None:
    """It would end with the connection. Whoever then calls rightly finds it waiting."""
    with pair_of_hosts() as pair, Serial(pair.shared / "serial") as serial, ExitStack() as stack:
        garbled = pair.shared / "garbled"
        garbled.mkdir()
        (garbled / "lazyproc-guest.img").write_text("{")
        where = f"{pair.destination.address}:4444"
        incoming = ("-incoming", f"tcp:{where}", "-global", "migration.x-postcopy-ram=on")
        guest = stack.enter_context(started(SMALL, serial, tmp_path, host=pair.source))
        serial.wait(5)
        there = stack.enter_context(started(SMALL, serial, tmp_path, *incoming, host=pair.destination))
        monitor(there).close()

        def serve(*words: object, expected: int) -> str:
            argv = [*CLI, "qemu-serve", *map(str, words), "--to", where]
            done = pair.source.run(argv, capture_output=True, text=True, timeout=60)
            assert done.returncode == expected, done.stderr
            assert there.process.poll() is None or expected == 0
            return str(done.stderr)

        assert "lazyproc-guest.img" in serve("-D", garbled, "--insecure", expected=1)
        with monitor(guest) as qmp:
            qmp.execute("stop")
        assert "is paused" in serve(guest.inside, "--insecure", expected=2)
        with monitor(guest) as qmp:
            qmp.execute("cont")
        assert "is another host" in serve(guest.inside, expected=1)
        serve(guest.inside, "--insecure", expected=0)
        goes_on(serial)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """And is not taken for a monitor."""
    done = lazyproc("qemu-serve", "-D", tmp_path / "typo", "--to", "unix:/nowhere", expected=1)
    assert f"{tmp_path / 'typo'}: no such file or directory; name an existing folder" in done.stderr


@pytest.mark.long
def test_a_running_guest_is_left_running(tmp_path: Path) -> None:
    with beating(SMALL, tmp_path) as guest:
        answer("checkpoint", "--qemu", guest.qmp, "-D", tmp_path / "images", "--leave-running")
        goes_on(guest.serial)


@pytest.mark.long
def test_a_running_guest_goes_on_there(tmp_path: Path) -> None:
    shape = Shape("q35", memory=96, visited=16, shared=True)
    with (
        beating(shape, tmp_path) as guest,
        waiting(shape, guest.serial, tmp_path / "there") as (_, where),
    ):
        guest.serial.wait(20)
        answer("qemu-serve", guest.qmp, "--to", where)
        assert guest.process.wait(5) == 0
        goes_on(guest.serial)


@pytest.mark.long
def test_two_go_on_from_one(tmp_path: Path) -> None:
    """Each on a serial line of its own, from where the first was heard last."""
    with saved(SMALL, tmp_path) as (images, serial), ExitStack() as stack:
        last = serial.beats()[-1].number
        lines = [stack.enter_context(Serial(tmp_path / f"serial{number}")) for number in range(2)]
        targets = [
            stack.enter_context(waiting(SMALL, line, tmp_path / f"there{number}"))[1]
            for number, line in enumerate(lines)
        ]
        report = answer("qemu-serve", "-D", images, *(word for where in targets for word in ("--to", where)))
        assert [each["target"] for each in report["guests"]] == targets
        for line in lines:
            goes_on(line)
            # One may have been cut in two: its first half is on the line where the guest was before.
            assert line.beats()[0].number - last in (1, 2)


@pytest.mark.parametrize(
    "says",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="something else"),
        pytest.param(b"", id="nothing", marks=pytest.mark.long),
    ],
)
def test_who_is_no_qemu_is_refused(tmp_path: Path, says: bytes) -> None:
    """And the guest goes on."""
    with beating(SMALL, tmp_path) as guest, stranger(tmp_path / "stranger", says) as where:
        done = lazyproc("qemu-serve", guest.qmp, "--to", where, expected=1)
        assert "no QEMU that takes a guest in" in done.stderr or "which no QEMU does" in done.stderr
        goes_on(guest.serial)


@contextmanager
def stranger(path: Path, says: bytes) -> Iterator[str]:
    """The address of somebody who answers the first that comes with this, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def be_strange() -> None:
            visitor, _ = listener.accept()
            with visitor:
                visitor.recv(1)
                visitor.sendall(says)

        thread = threading.Thread(target=be_strange)
        thread.start()
        yield f"unix:{path}"
        thread.join()


CUT_AFTER = 16 << 20  # bytes


@contextmanager
def cut_short(target: str, path: Path, connections: int = 1) -> Iterator[str]:
    """An address that leads to `target`, so often, until so many bytes have gone there by the first connection."""

    def carry(one: socket.socket, other: socket.socket, most: float) -> None:
        with suppress(OSError):
            while most > 0 and (data := one.recv(1 << 16)):
                other.sendall(data)
                most -= len(data)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            threads = []
            for most in (CUT_AFTER, math.inf)[:connections]:
                near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
                stack.enter_context(near)
                stack.enter_context(far).connect(target.removeprefix("unix:"))
                for way in ((near, far, most), (far, near, math.inf)):
                    threads.append(threading.Thread(target=carry, args=way))
                    threads[-1].start()
            for each in threads:
                each.join()

        thread = threading.Thread(target=run)
        thread.start()
        yield f"unix:{path}"
        thread.join()


def recovering(there: Guest, path: Path) -> str:
    """Where QEMU waits for a source after it has lost the one it had."""
    with monitor(there) as qmp:
        wait_until(lambda: qmp.execute("query-migrate")["status"] == "postcopy-paused", "QEMU notices")
        qmp.execute("migrate-recover", {"uri": f"unix:{path}"})
    return f"unix:{path}"


@pytest.mark.parametrize(
    "preempt", [pytest.param(False, id="one"), pytest.param(True, id="two", marks=pytest.mark.long)]
)
def test_a_lost_connection_is_recovered(preempt: bool, tmp_path: Path) -> None:
    """By QEMU's own means: what has come does not come again."""
    options, capabilities = (["--preempt"], ["postcopy-preempt"]) if preempt else ([], [])
    with (
        saved(SMALL, tmp_path) as (images, serial),
        waiting(SMALL, serial, tmp_path / "there", capabilities=capabilities) as (there, where),
    ):
        with cut_short(where, tmp_path / "cut", 1 + preempt) as cut:
            lost = lazyproc("qemu-serve", "-D", images, "--to", cut, *options, expected=4)
            assert "QEMU is lost" in lost.stderr
        again = recovering(there, tmp_path / "again")
        whole = sum(path.stat().st_size for path in images.glob("pages-*.img"))
        report = answer("qemu-serve", "-D", images, "--to", again, "--recover", *options)
        assert (report["pages_urgent"] + report["pages_bulk"]) * PAGE <= whole - CUT_AFTER // 2
        goes_on(serial)


@pytest.fixture
def signals() -> Iterator[None]:
    """A command that is over hears none any more, and here it is run in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, action in before.items():
        signal.signal(number, action)


def interrupt_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    end = HeldGuest.end

    def interrupted(held: HeldGuest) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        end(held)

    monkeypatch.setattr(HeldGuest, "end", interrupted)


@pytest.mark.usefixtures("signals")
def test_an_interrupt_while_qemu_quits_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest has all of its pages there, and is no longer one here."""
    interrupt_the_end(monkeypatch)
    with (
        beating(SMALL, tmp_path) as guest,
        waiting(SMALL, guest.serial, tmp_path / "there") as (_, where),
    ):
        assert main(["qemu-serve", str(guest.qmp), "--to", where]) == 0
        assert guest.process.wait(5) == 0
        goes_on(guest.serial)


@pytest.mark.usefixtures("signals")
def test_an_interrupt_while_the_qemu_of_a_saved_guest_quits_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_the_end(monkeypatch)
    with beating(SMALL, tmp_path) as guest:
        assert main(["checkpoint", "--qemu", str(guest.qmp), "-D", str(tmp_path / "images")]) == 0
        assert guest.process.wait(5) == 0
        assert "pc.ram" in lazyproc("show", tmp_path / "images").stdout


def test_a_listener_that_fails_leaves_what_can_be_recovered(tmp_path: Path) -> None:
    """The guest runs there, and the disk here is full."""

    def fail(event: Event) -> None:
        if isinstance(event, PagesMoved) and event.bulk:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        saved(SMALL, tmp_path) as (images, serial),
        waiting(SMALL, serial, tmp_path / "there") as (there, where),
    ):
        with pytest.raises(Parked, match=r"No space left on device.*--recover"):
            qemu_serve(images, where, listener=fail)
        answer("qemu-serve", "-D", images, "--to", recovering(there, tmp_path / "again"), "--recover")
        goes_on(serial)


def test_a_log_that_cannot_be_written_ends_nothing_else(tmp_path: Path) -> None:
    with (
        saved(SMALL, tmp_path) as (images, _),
        Serial(tmp_path / "other") as other,
        waiting(SMALL, other, tmp_path / "there") as (_, where),
    ):
        log = ("--log-file", "/dev/full")
        done = lazyproc("qemu-serve", "-D", images, "--to", where, *log, expected=0)
        assert "note: /dev/full: the log ends here: No space left on device" in done.stderr
        goes_on(other)


@pytest.mark.long
def test_a_clone_that_is_lost_leaves_the_others_alone(tmp_path: Path) -> None:
    with (
        saved(SMALL, tmp_path) as (images, _),
        Serial(tmp_path / "one") as one,
        Serial(tmp_path / "two") as two,
        waiting(SMALL, one, tmp_path / "there") as (there, where),
        waiting(SMALL, two, tmp_path / "elsewhere") as (_, elsewhere),
    ):
        with cut_short(where, tmp_path / "cut") as cut:
            lost = lazyproc("qemu-serve", "-D", images, "--to", cut, "--to", elsewhere, expected=4)
            assert f"unix:{tmp_path / 'cut'}: QEMU is lost" in lost.stderr
        goes_on(two)
        again = recovering(there, tmp_path / "again")
        answer("qemu-serve", "-D", images, "--to", again, "--recover")
        goes_on(one)


@pytest.mark.long
def test_no_clone_runs_before_all_are_taken_in(tmp_path: Path) -> None:
    with (
        saved(SMALL, tmp_path) as (images, _),
        Serial(tmp_path / "one") as one,
        waiting(SMALL, one, tmp_path / "there") as (_, where),
        stranger(tmp_path / "stranger", b"") as nobody,
    ):
        lazyproc("qemu-serve", "-D", images, "--to", where, "--to", nobody, expected=1)
        assert one.beats() == []


@contextmanager
def lost_on_its_way(tmp_path: Path) -> Iterator[tuple[Guest, Guest, str]]:
    """A guest that stands here and runs there, without all of its pages; and the session that is left of it here."""
    with (
        beating(SMALL, tmp_path) as guest,
        waiting(SMALL, guest.serial, tmp_path / "there") as (there, where),
    ):
        with cut_short(where, tmp_path / "cut") as cut:
            lost = lazyproc("qemu-serve", guest.qmp, "--to", cut, expected=4).stderr
        (found,) = (each for each in answer("sessions") if each["root_pid"] == guest.process.pid)
        ways = (
            f"qemu-serve {guest.qmp} --to ... --recover; or, .* lazyproc resume {found['id']} --here --force"
        )
        try:
            assert found["state"] == "orphaned"
            assert re.search(ways, lost)
            assert re.search(ways, found["reason"])
            yield guest, there, found["id"]
        finally:
            if found["id"] in lazyproc("sessions").stdout:
                lazyproc("abort", found["id"])


def test_a_guest_that_ran_here_is_recovered(tmp_path: Path) -> None:
    """It stands here until all of it is there, nobody takes it for one that was paused, and QEMU there decides."""
    with lost_on_its_way(tmp_path) as (guest, there, session):
        with monitor(guest) as qmp:
            assert not qmp.execute("query-status")["running"]
        for refused in (
            lazyproc("explain", "--qemu", guest.qmp, expected=3).stdout,
            lazyproc("checkpoint", "--qemu", guest.qmp, "-D", tmp_path / "images", expected=3).stderr,
            lazyproc("resume", session, expected=2).stderr,
        ):
            assert f"resume {session} --here --force" in refused
        again = recovering(there, tmp_path / "again")
        answer("qemu-serve", guest.qmp, "--to", again, "--recover")
        assert guest.process.wait(5) == 0
        assert session not in lazyproc("sessions").stdout
        goes_on(guest.serial)


def test_a_guest_that_does_not_run_there_is_continued_here(tmp_path: Path) -> None:
    with lost_on_its_way(tmp_path) as (guest, there, session):
        there.process.kill()
        there.process.wait()
        assert "add --force" in lazyproc("resume", session, "--here", expected=2).stderr
        lazyproc("resume", session, "--here", "--force")
        with monitor(guest) as qmp:
            assert qmp.execute("query-status")["running"]
        lazyproc("explain", "--qemu", guest.qmp)


def test_a_guest_whose_qemu_has_ended_meanwhile(tmp_path: Path) -> None:
    with lost_on_its_way(tmp_path) as (guest, _, session):
        guest.process.kill()
        guest.process.wait()
        assert "nothing is left" in lazyproc("resume", session, expected=2).stderr
        assert session not in lazyproc("sessions").stdout


@pytest.mark.long
def test_what_is_waited_for_has_a_connection_of_its_own(tmp_path: Path) -> None:
    with (
        saved(SMALL, tmp_path) as (images, serial),
        waiting(SMALL, serial, tmp_path / "there", capabilities=["postcopy-preempt"]) as (_, where),
    ):
        report = answer("qemu-serve", "-D", images, "--to", where, "--preempt")
        assert report["pages_urgent"] > 0
        goes_on(serial)


@pytest.mark.long
def test_a_qemu_without_a_second_connection_is_refused(tmp_path: Path) -> None:
    """Before the guest waits for pages by it."""
    with (
        beating(SMALL, tmp_path) as guest,
        waiting(SMALL, guest.serial, tmp_path / "there") as (_, where),
    ):
        refused = lazyproc("qemu-serve", guest.qmp, "--to", where, "--preempt", expected=1)
        assert "postcopy-preempt" in refused.stderr
        goes_on(guest.serial)


@pytest.mark.long
@pytest.mark.parametrize("preempt", [False, True], ids=["one", "two"])
def test_with_tls_as_qemu_speaks_it(preempt: bool, tmp_path: Path) -> None:
    """Each end has a certificate of one CA; who comes without is refused, and the guest goes on."""
    options, capabilities = (["--preempt"], ["postcopy-preempt"]) if preempt else ([], [])
    here, there = make_keys(tmp_path / "keys", ("localhost", "127.0.0.1"))
    folder = tmp_path / "credentials"
    folder.mkdir()
    for name, path in (("ca-cert", there.ca), ("server-cert", there.cert), ("server-key", there.key)):
        (folder / f"{name}.pem").symlink_to(path)
    credentials = ("-object", f"tls-creds-x509,id=tls,dir={folder},endpoint=server,verify-peer=on")
    trust = ["--tls-cert", here.cert, "--tls-key", here.key, "--tls-ca", here.ca]
    with (
        beating(SMALL, tmp_path) as guest,
        waiting(
            SMALL, guest.serial, tmp_path / "there", *credentials, capabilities=capabilities, tls="tls"
        ) as (_, where),
    ):
        lazyproc("qemu-serve", guest.qmp, "--to", where, *options, expected=1)
        goes_on(guest.serial)
        answer("qemu-serve", guest.qmp, "--to", where, *options, *trust)
        goes_on(guest.serial)
