"""`receive --allow-uid` says as whom trees may run: nobody becomes more by way of a migration, whatever he says."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.files import Folder, pack
from lazyproc.model import Checkpoint, Credentials, Owner, TaskState
from lazyproc.pages.bundle import NAME
from tests.live.bad_luck import images_sent, lazyproc, migrated, says, unchanged, unharmed
from tests.live.moving import Receiver, checkpoint, receiving, run_cli
from tests.live.programs import Program, compile_program, running
from tests.live.real import ending, move_now
from tests.live.test_needs import cargo
from tests.live.test_tls import keys

UID = 65534
ONLY = ("--allow-uid", str(UID))
NOBODY = f"--reuid={UID} --regid={UID} --clear-groups"


@contextmanager
def run_as(pair: Pair, options: str = NOBODY, *, before: str = "", after: str = "") -> Iterator[Program]:
    """A program of another user, who owns what it writes to: `before` is done as root, `options` are setpriv's."""
    name = "memory_random"
    script = pair.shared / "start"
    script.write_text(
        f'#!/bin/sh\nchown {UID} "$1" /proc/self/fd/1; chmod 666 "$1"\n{before}\n'
        f'exec setpriv {options} {after} {compile_program(name)} "$@"\n'
    )
    script.chmod(0o755)
    with running(name, 8, 2, 1000, directory=pair.shared, host=pair.source, binary=script) as program:
        yield program


def arrives(pair: Pair, receiver: Receiver, program: Program) -> None:
    """As who it was, with every page."""
    before = Path(f"/proc/{program.pid}/status").read_text()
    new, _ = move_now(pair.source, receiver, program.pid)
    with ending(new):
        program.watch.wait_beats()
        assert ids(Path(f"/proc/{new}/status").read_text()) == ids(before)
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def ids(status: str) -> list[str]:
    lines = status.splitlines()
    return [line for line in lines if line.startswith(("Uid:", "Gid:", "Groups:", "Cap"))]


# --- what may come, and what may not ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--allow-uid", str(UID - 1))], ids=["alone", "among others"])
def test_a_tree_of_that_user_arrives(pair: Pair, more: tuple[str, ...]) -> None:
    with run_as(pair) as program, receiving(pair.destination, *ONLY, *more) as receiver:
        arrives(pair, receiver, program)


def test_roots_tree_arrives_where_root_is_allowed(pair: Pair) -> None:
    with run_as(pair, "--groups 0,4") as program, receiving(pair.destination, "--allow-uid", "0") as receiver:
        arrives(pair, receiver, program)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--reuid=0", ("uid 0", "--allow-uid 0")),
        (f"--ruid={UID} --euid=0 --regid={UID} --clear-groups", ("is of uid 0",)),
        (f"--reuid=1 --regid={UID} --clear-groups", ("is of uid 1, ", "--allow-uid 1")),
        (f"--reuid={UID} --regid=0 --clear-groups", ("is of group 0",)),
        (f"--reuid={UID} --regid={UID} --groups=0,{UID}", ("is of group 0",)),
        (f"{NOBODY} --inh-caps=+net_raw", ("capabilities (0x2000)",)),
        (f"{NOBODY} --inh-caps=+net_raw --ambient-caps=+net_raw", ("capabilities (0x2000)",)),
        (f"{NOBODY} --bounding-set=-setuid", ("bounding set (0x80)", "--no-new-privs")),
    ],
    ids=["root", "effective", "another", "group", "groups", "inheritable", "ambient", "bounding"],
)
def test_whoever_else_is_refused_before_the_freeze(pair: Pair, options: str, words: tuple[str, ...]) -> None:
    with (
        run_as(pair, options) as program,
        receiving(pair.destination, *ONLY) as receiver,
        unchanged(pair.destination),
        unharmed(program),
    ):
        done = migrated(pair, receiver, program.pid)
        says(done, 3, f"only uid {UID} is taken in here (receive --allow-uid)", *words)
        assert "frozen" not in done.stderr
        pid = str(pair.source.vpid(program.pid))
        told = run_cli(pair.source, "explain", pid, "--peer", receiver.address, "--insecure", expected=3)
        assert all(word in told.stdout for word in words)


def test_confined_with_no_new_privs_it_arrives(pair: Pair) -> None:
    with (
        run_as(pair, f"{NOBODY} --bounding-set=-setuid --no-new-privs") as program,
        receiving(pair.destination, *ONLY) as receiver,
    ):
        arrives(pair, receiver, program)


def test_securebits_are_seen_in_the_images(pair: Pair) -> None:
    """Nobody but the process itself can read them: it is frozen, refused, and runs on."""
    with (
        run_as(pair, f"{NOBODY} --securebits=+noroot") as program,
        receiving(pair.destination, *ONLY) as receiver,
        unchanged(pair.destination),
        unharmed(program),
    ):
        says(migrated(pair, receiver, program.pid), 1, "has securebits (0x1)", f"only uid {UID}")


def test_a_file_that_its_user_may_not_open_is_not_opened_for_it(pair: Pair) -> None:
    """Root has opened it and given it away: whoever says so of a process could have any file of this host."""
    secret = pair.shared / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    with (
        run_as(pair, before=f"exec 9<{secret}") as program,
        receiving(pair.destination, *ONLY) as receiver,
        unchanged(pair.destination),
        unharmed(program),
    ):
        says(migrated(pair, receiver, program.pid), 3, str(secret), "cannot be opened as before")


def test_what_root_has_prepared_for_it_is_refused(pair: Pair) -> None:
    """A port and filters that its user could not have got by himself."""
    filters = "struct.pack('HBBI', 6, 0, 0, 0x7FFF0000)"  # SECCOMP_RET_ALLOW
    script = f"""
import struct
s = socket.socket(); s.bind(("127.0.0.1", 80)); s.listen()
program = ctypes.create_string_buffer({filters})
head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
libc = ctypes.CDLL(None)
assert libc.prctl(22, 2, ctypes.c_ulong(ctypes.addressof(head)), 0, 0) == 0
os.setgroups([]); os.setgid({UID}); os.setuid({UID})
"""
    with cargo(pair, script) as it, receiving(pair.destination, *ONLY) as receiver:
        done = migrated(pair, receiver, it.pid)
        words = ("has port 80, which only root may take", "has seccomp filters without no_new_privs")
        says(done, 3, *words)
        it.goes_on()


def test_a_deleted_file_of_roots_is_refused(pair: Pair) -> None:
    """A set-uid program that nobody can see."""
    gone = pair.shared / "gone"
    with (
        run_as(pair, before=f"cp /bin/true {gone}; chmod 4755 {gone}; exec 9<{gone}; rm {gone}") as program,
        receiving(pair.destination, *ONLY) as receiver,
        unchanged(pair.destination),
        unharmed(program),
    ):
        says(migrated(pair, receiver, program.pid), 3, "is of uid 0", "file ")


# --- who may come ---------------------------------------------------------------------------------------------


def test_with_tls_it_says_as_whom_and_no_more(pair: Pair) -> None:
    ours, theirs = keys(pair)
    with receiving(pair.destination, *ONLY, trust=theirs, clients=ours) as receiver:
        with run_as(pair, "--reuid=0") as program, unharmed(program):
            done = lazyproc(pair.source, "migrate", pair.source.vpid(program.pid), receiver.address, *ours)
            says(done, 3, "is of uid 0", f"only uid {UID}")
        with run_as(pair) as program:
            arrives(pair, receiver, program)


# --- a peer that lies ---------------------------------------------------------------------------------------


Lie = Callable[[Checkpoint], Checkpoint]


def credentials(**changes: object) -> Lie:
    """Of its only thread."""

    def change(it: Checkpoint) -> Checkpoint:
        thread = it.root.leader
        mine: Credentials = replace(thread.credentials, **changes)  # type: ignore[arg-type]
        root = replace(it.root, threads=(replace(thread, credentials=mine), *it.root.threads[1:]))
        return replace(it, tasks=(root,))

    return change


def chroot(it: Checkpoint) -> Checkpoint:
    """Its root directory is where it works."""
    assert it.root.fs is not None
    root = replace(it.root, fs=replace(it.root.fs, root_id=it.root.fs.cwd_id))
    return replace(it, tasks=(root,))


def signals(it: Checkpoint) -> Checkpoint:
    """Whoever writes to its log kills the receiver's init."""
    return replace(
        it, files={**it.files, **{n: replace(f, owner=Owner(1, 1, 9)) for n, f in it.files.items()}}
    )


@pytest.mark.parametrize(
    ("lie", "says_why"),
    [
        (credentials(uid=0), "is of uid 0"),
        (credentials(suid=0), "is of uid 0"),
        (credentials(fsuid=0), "is of uid 0"),
        (credentials(groups=(0,)), "is of group 0"),
        (credentials(cap_permitted=1 << 21), "capabilities (0x200000)"),
        (credentials(cap_effective=1), "capabilities (0x1)"),
        (credentials(securebits=4), "securebits (0x4)"),
        (chroot, "another root directory"),
        (signals, "sends signals to process 1"),
    ],
    ids=["real", "saved", "fs", "groups", "permitted", "effective", "securebits", "chroot", "signals"],
)
def test_who_keeps_silent_about_it_has_nothing_started(pair: Pair, lie: Lie, says_why: str) -> None:
    """He says that it needs nothing, and then sends something else than what he asked for."""
    images = a_lie(pair, lie)
    with receiving(pair.destination, *ONLY) as receiver, unchanged(pair.destination):
        reason = images_sent(pair, receiver, images)
        assert says_why in reason, reason
        assert f"only uid {UID} is taken in here" in reason
        assert "arrival: arrange" not in receiver.notes()


def test_a_root_that_has_ended_is_no_tree(pair: Pair) -> None:
    """Nobody has threads in which one could look who runs."""

    def lie(it: Checkpoint) -> Checkpoint:
        ended = replace(it.root, state=TaskState.ZOMBIE, threads=(), mm=None, fs=None, descriptors=())
        return replace(it, tasks=(ended,), memory={})

    images = a_lie(pair, lie)
    with receiving(pair.destination, *ONLY) as receiver, unchanged(pair.destination):
        assert "has ended: nothing of it can run" in images_sent(pair, receiver, images)


def test_who_says_that_it_has_a_file_of_roots_does_not_get_it(pair: Pair) -> None:
    secret = pair.shared / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)

    def lie(it: Checkpoint) -> Checkpoint:
        (log,) = (file for file in it.files.values() if ".log" in getattr(file.resource, "path", ""))
        other = replace(log, resource=replace(log.resource, path=str(secret)))  # type: ignore[arg-type]
        return replace(it, files={**it.files, log.id: other})

    images = a_lie(pair, lie)
    with receiving(pair.destination, *ONLY) as receiver, unchanged(pair.destination):
        reason = images_sent(pair, receiver, images)
        assert f"{secret}: cannot be opened as before (Permission denied)" in reason
        assert "committed" not in receiver.notes()


def a_lie(pair: Pair, lie: Lie) -> bytes:
    """The images of a real process of that user, changed; without pages."""
    folder = pair.shared / "images"
    with run_as(pair) as program:
        checkpoint(pair.source, program.pid, folder, "--leave-running")
    images = to_images(lie(from_images(Folder(folder).read())))
    return pack({**images, NAME: bytes(8)})
