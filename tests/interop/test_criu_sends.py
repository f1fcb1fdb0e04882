"""`lazyproc serve --receive` stores what `criu dump --page-server` sends."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from lazyproc.hosts import Pair
from lazyproc.wire.criu import Command, Flag, Message
from tests.faults.hostile import Listener, listening
from tests.interop.criu_hosts import END_S, restored_by_criu, run_criu, running_there, wait_gone
from tests.live.criu_client import CriuClient
from tests.live.moving import INSECURE, restore

MIB = 16


def dump_to(pair: Pair, server: Listener, images: Path, vpid: int) -> None:
    address, _, port = server.address.rpartition(":")
    images.mkdir()
    run_criu(
        pair.source, images, "dump", "--tree", vpid, "--page-server", "--address", address, "--port", port
    )


def test_a_dump(pair: Pair) -> None:
    """Both folders together are a checkpoint, for CRIU and for lazyproc."""
    images, pages = pair.shared / "images", pair.shared / "pages"
    with (
        running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as program,
        listening(pair.destination, "serve", "-D", pages, "--receive", *INSECURE) as server,
    ):
        program.watch.wait_beats()
        dump_to(pair, server, images, pair.source.vpid(program.pid))
        program.process.wait()
        assert server.process.wait(END_S) == 0, server.log.read_text()
        assert sorted(path.name for path in pages.glob("pages-*")) == ["pages-65537.img"]
        shutil.copytree(pages, images, dirs_exist_ok=True)
        again, written = (
            pair.shared / "again",
            program.watch.path.with_name(program.watch.path.name + ".file"),
        )
        length = written.stat().st_size
        shutil.copytree(images, again)
        moved = restore(pair.destination, again)
        program.watch.wait_beats()
        os.kill(moved.pid, signal.SIGKILL)
        wait_gone(moved.pid)
        os.truncate(written, length)  # as it was dumped: CRIU wants mapped and open files of the same size
        work = pair.shared / "work"
        work.mkdir()
        with restored_by_criu(pair.source, images, work=work):
            pass  # the watch knows that there was another copy: CRIU takes the images, which is what is asked


def test_what_breaks_off_leaves_nothing(pair: Pair) -> None:
    pages = pair.shared / "pages"
    with listening(pair.source, "serve", "-D", pages, "--receive", *INSECURE) as server:
        dial = server.dial_from(pair.destination)
        for said in (b"", b"GET / HTTP/1.0\r\n" + bytes(40)):
            with dial() as stranger:
                stranger.sendall(said)
        with CriuClient(dial()) as client:
            send = client.connection.send
            client.sock.sendall(send(Message(Command.OPEN2, dst_id=7 << 8 | 1)))
            client.receive()
            add = Message(Command.ADD_F, 2, 0x10000, 7 << 8 | 1, Flag.PRESENT)
            client.sock.sendall(send(add) + bytes(5000))
        with CriuClient(dial()) as client:
            client.sock.sendall(client.connection.send(Message(Command.OPEN2, dst_id=8 << 8 | 1)))
            client.receive()
            client.close_in_order()
        assert server.process.wait(END_S) == 0
        assert sorted(os.listdir(pages)) == ["pagemap-8.img", "pages-65537.img"]
