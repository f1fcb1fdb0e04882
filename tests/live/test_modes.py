"""What lazyproc writes is private, by the real commands in a shell that has switched its umask off."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.errors import LazyprocError
from lazyproc.hosts import Pair
from lazyproc.pages.dial import dial
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.wire.native import Party, Role
from tests.faults.helpers import DESTINATION, SOURCE, journal
from tests.live.bad_luck import lazyproc
from tests.live.moving import receiving, run_cli
from tests.live.programs import Program, running
from tests.live.real import ending, migrating, network_of, processes_of
from tests.needs import require

OPEN = ("sh", "-c", 'umask 0; exec "$@"', "sh")


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", 16, 2, directory=pair.shared, host=pair.source) as it:
        it.watch.wait_beats()
        yield it


@contextmanager
def private(*places: Path) -> Iterator[set[str]]:
    """What is new below these folders after the block is nobody else's; the names of it."""
    before = {path: everything(path) for path in places}
    new: set[str] = set()
    yield new
    for place in places:
        found = everything(place)
        new |= {path.name for path in found.keys() - before[place].keys()}
        loose = {
            str(path): oct(mode)
            for path, mode in found.items()
            if path not in before[place] and not stat.S_ISLNK(mode) and mode & 0o077
        }
        assert not loose, loose


def everything(place: Path) -> dict[Path, int]:
    paths = (Path(folder, name) for folder, names, files in os.walk(place) for name in (*names, *files))
    return {path: path.lstat().st_mode for path in paths}


def test_of_a_checkpoint_and_its_restore(pair: Pair, program: Program) -> None:
    here = pair.source
    with private(here.outside) as new:
        done = lazyproc(
            *(here, "checkpoint", here.vpid(program.pid), "-D", here.scratch / "images"),
            *("--log-file", here.scratch / "checkpoint.log"),
            by=OPEN,
        )
        assert done.returncode == 0, done.stderr
        done = lazyproc(
            *(here, "restore", "-D", here.scratch / "images", "--lazy", "--detach"),
            *("--log-file", here.scratch / "restore.log", "--trace", here.scratch / "trace"),
            *("--pidfile", here.scratch / "pid"),
            by=OPEN,
        )
        assert done.returncode == 0, done.stderr
        with ending(here.pid(int((here.outside / "pid").read_text()))):
            pass
    assert {"images", "pages-1.img", "inventory.img", "checkpoint.log", "restore.log", "trace", "pid"} <= new


def test_of_both_sides_of_a_migration(pair: Pair, program: Program) -> None:
    """Journals and their folders; and the ledger, a descriptor of which the process itself has for so long."""
    source, destination = pair.source, pair.destination
    log = ("--log-file", source.scratch / "source.log", "--trace", source.scratch / "trace")
    with receiving(destination, "--log-file", str(destination.scratch / "there.log"), by=OPEN) as receiver:
        options = (*map(str, log), "--no-bulk")
        with migrating(source, receiver, program.pid, *options, run_by=OPEN) as journey:
            journey.wait_running()
            root = destination.pid(journal(destination, DESTINATION)["tree"]["root_pid"])
            with ending(root):
                for role, host in (SOURCE, source), (DESTINATION, destination):
                    journal(host, role)
                    state = host.outside / "state"
                    modes = {state: state.stat().st_mode, **everything(state)}
                    assert not [path for path, mode in modes.items() if mode & 0o077], modes
                assert {mode & 0o777 for mode in ledgers(root)} == {0o600}
            journey.finish()
    for path in (source.outside / "source.log", source.outside / "trace", destination.outside / "there.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_secret_of_a_session_is_nowhere_to_be_seen(pair: Pair, program: Program) -> None:
    """Who knew it could go on with the session: it is in the two journals. The name alone, which everybody may see,
    opens nothing.
    """
    source, destination = pair.source, pair.destination
    with (
        receiving(destination) as receiver,
        migrating(source, receiver, program.pid, "--no-bulk") as journey,
    ):
        journey.wait_running()
        record = journal(destination, DESTINATION)
        with ending(destination.pid(record["tree"]["root_pid"])):
            said = journey.log() + receiver.notes()
            for host in (source, destination):
                said += run_cli(host, "sessions", "--json").stdout
                said += "".join(command_line(pid) for pid in processes_of(host))
            assert record["id"] in said
            assert record["token"] not in said
            thief = Session(record["id"], "0" * len(record["token"]))
            with network_of(source), pytest.raises(LazyprocError, match="no such session"):
                dial(
                    receiver.address,
                    thief.hello(Role.CONTROL, resume=True),
                    Party.SOURCE,
                    trust=Trust(insecure=True),
                )
            program.watch.wait_beats()
        journey.finish()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ledgers(pid: int) -> list[int]:
    """The modes of those that a process holds."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return [fd.stat().st_mode for fd in links if "lazyproc-ledger" in os.readlink(fd)]


def test_of_keys(pair: Pair) -> None:
    require("openssl")
    here = pair.source
    with private(here.outside) as new:
        done = lazyproc(here, "keys", here.scratch / "a" / "keys", "one", "other", by=OPEN)
        assert done.returncode == 0, done.stderr
    assert {"a", "keys", "ca.key"} <= new
