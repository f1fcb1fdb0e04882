"""A guest that lazyproc lets stand still, or found standing: nothing is left as it was not before."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lazyproc.errors import LazyprocError, NoSuchProcess
from lazyproc.events import Event, StateChanged, ignore
from lazyproc.facts import replace
from lazyproc.images.files import GUEST
from lazyproc.kernel import family, proc
from lazyproc.migrate.guest_checkpoint import checkpoint_guest
from lazyproc.migrate.guest_serve import qemu_serve
from lazyproc.migrate.guest_watch import watched
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.qemu import devices, saved
from lazyproc.qemu.guest import look
from lazyproc.qemu.qmp import Qmp
from tests.live.programs import wait_until
from tests.qemu.guests import Guest, Serial, Shape, beating, empty_disk, monitor, started, waiting
from tests.qemu.test_serve import answer, goes_on, lazyproc

SMALL = Shape(memory=96, visited=16)


def test_a_paused_guest_keeps_its_disks(tmp_path: Path) -> None:
    """A QEMU that has let go of them aborts when it is asked to do so again."""
    with beating(replace(SMALL, disk=empty_disk(tmp_path)), tmp_path) as guest:
        with monitor(guest) as qmp:
            qmp.execute("stop")
        for number in range(2):
            answer("checkpoint", "--qemu", guest.qmp, "-D", tmp_path / f"images{number}", "--leave-running")
        with monitor(guest) as qmp:
            assert qmp.execute("query-status")["status"] == "paused"
            qmp.execute("cont")
        goes_on(guest.serial)


@pytest.mark.parametrize("told", [False, True])
def test_a_guest_whose_command_is_killed_goes_on(told: bool, tmp_path: Path) -> None:
    """Unless it may run elsewhere by then."""
    with beating(SMALL, tmp_path) as guest:
        reading, writing = os.pipe()
        command = family.child(lambda: _stand(guest, writing, told=told), "command")
        os.close(writing)
        assert os.read(reading, 1) == b"s"
        os.kill(command, signal.SIGKILL)
        os.waitpid(command, 0)
        assert os.read(reading, 1) == b"", "its watcher has what the command had"
        os.close(reading)
        if told:
            wait_until(lambda: not _watchers(), "nobody watches it any more")
            with monitor(guest) as qmp:
                assert qmp.execute("query-status")["running"] is False
                qmp.execute("cont")
        goes_on(guest.serial)


def test_a_guest_that_somebody_else_has_stopped_is_left_alone(tmp_path: Path) -> None:
    with beating(SMALL, tmp_path) as guest:
        with monitor(guest) as qmp:
            held = HeldGuest(look(qmp))
            qmp.execute("stop")
            with pytest.raises(LazyprocError, match="somebody else"), watched(qmp, held):
                pass
        wait_until(lambda: not _watchers(), "nobody watches it any more")
        with monitor(guest) as qmp:
            assert qmp.execute("query-status")["running"] is False


@pytest.mark.parametrize("words", [("cont",), ("cont", "stop"), ("system_reset",)], ids=" ".join)
def test_a_guest_that_somebody_else_lets_go_on_is_not_saved(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does its QEMU quit: what was written of it is of two moments."""
    write = saved.write

    def written(*args: Any) -> int:
        count = write(*args)
        _by_another(guest, *((word, {}) for word in words))
        return count

    monkeypatch.setattr(saved, "write", written)
    with beating(SMALL, tmp_path, *_second(tmp_path), "-action", "reboot=reset") as guest:
        with pytest.raises(LazyprocError, match="somebody else has continued the guest, or has reset it"):
            checkpoint_guest(str(guest.qmp), tmp_path / "images", leave_running=False, listener=ignore)
        assert not (tmp_path / "images" / GUEST).exists()
        if "cont" in words:
            goes_on(guest.serial)


def test_a_guest_that_somebody_else_lets_go_on_does_not_go_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = devices.saved

    def saved_devices(*args: Any) -> bytes:
        state = save(*args)
        _by_another(guest, ("cont", {}))
        return state

    monkeypatch.setattr(devices, "saved", saved_devices)
    with (
        beating(SMALL, tmp_path, *_second(tmp_path)) as guest,
        Serial(tmp_path / "there.serial") as serial,
        waiting(SMALL, serial, tmp_path / "there") as (_, where),
    ):
        with pytest.raises(LazyprocError, match="somebody else has continued the guest"):
            qemu_serve(str(guest.qmp), where, listener=ignore)
        goes_on(guest.serial)
        assert serial.beats() == []


def test_two_do_not_take_one_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would take it for paused, save it as that, and let its QEMU quit."""
    write, said = saved.write, []

    def written(*args: Any) -> int:
        second = ("checkpoint", "--qemu", tmp_path / "second", "-D", tmp_path / "other")
        said.append(lazyproc(*second, expected=1).stderr)
        count: int = write(*args)
        return count

    monkeypatch.setattr(saved, "write", written)
    with beating(SMALL, tmp_path, *_second(tmp_path)) as guest:
        checkpoint_guest(str(guest.qmp), tmp_path / "images", leave_running=True, listener=ignore)
        assert "another lazyproc saves or moves the guest" in said[0]
        goes_on(guest.serial)


def test_memory_that_is_plugged_after_the_look_is_not_left_out(tmp_path: Path) -> None:
    def plug(event: Event) -> None:
        if isinstance(event, StateChanged) and event.state == "frozen":  # it will be
            backend = {"qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20}
            dimm = {"driver": "pc-dimm", "id": "dimm", "memdev": "more"}
            _by_another(guest, ("object-add", backend), ("device_add", dimm))

    with beating(replace(SMALL, slots=True), tmp_path, *_second(tmp_path)) as guest:
        with pytest.raises(LazyprocError, match="has other RAM than a moment ago"):
            checkpoint_guest(str(guest.qmp), tmp_path / "images", leave_running=False, listener=plug)
        goes_on(guest.serial)
        answer("checkpoint", "--qemu", guest.qmp, "-D", tmp_path / "images", "--leave-running")
        goes_on(guest.serial)


def _second(folder: Path) -> tuple[str, str]:
    return "-qmp", f"unix:{folder / 'second'},server=on,wait=off"


def _by_another(guest: Guest, *commands: tuple[str, dict[str, Any]]) -> None:
    with Qmp(str(guest.qmp.parent / "second")) as qmp:
        for name, arguments in commands:
            qmp.execute(name, arguments)


def _stand(guest: Guest, writing: int, *, told: bool) -> None:
    with Qmp(str(guest.qmp)) as qmp, watched(qmp, HeldGuest(look(qmp))) as over:
        if told:
            over.set()
        os.write(writing, b"s")
        signal.pause()


def _watchers() -> list[int]:
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with suppress(NoSuchProcess):
            if (stat := proc.stat(proc.read(pid, "stat"))).comm == "lazyproc-watch" and stat.state != "Z":
                found.append(pid)
    return found


def test_an_answer_to_another_question_is_not_taken(tmp_path: Path) -> None:
    """Whoever has not waited for the one before."""
    with (
        Serial(tmp_path / "serial") as serial,
        started(SMALL, serial, tmp_path, "-S") as guest,
        monitor(guest) as qmp,
    ):
        with pytest.raises(TimeoutError):
            qmp.execute("query-commands", timeout=0)
        assert qmp.execute("query-status")["status"] == "prelaunch"
