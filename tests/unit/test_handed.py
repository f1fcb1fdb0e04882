"""Whatever comes over lazy-pages.socket is taken or refused, and no descriptor stays open."""

from __future__ import annotations

import array
import os
import socket
import struct
from contextlib import closing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ConnectionLost, ProtocolError
from lazyproc.restore.handed import FINISHED, Restorer, forestall, has_finished

ALIVE, ZOMBIE = 7, 8
EXPECTED = {ALIVE: True, ZOMBIE: False}
NUMBERS = st.sampled_from([ALIVE, ZOMBIE, -ALIVE, -ZOMBIE, 0, 9]).map(struct.Struct("<i").pack)


@given(
    st.lists(
        st.tuples(NUMBERS | st.binary(min_size=1, max_size=9), st.integers(0, 3)), min_size=1, max_size=8
    )
)
def test_strangers(messages: list[tuple[bytes, int]]) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    with near, closing(Restorer(far, EXPECTED)) as restorer, open("/dev/null") as null:
        for data, count in messages:
            rights = array.array("i", [null.fileno()] * count)
            near.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else [])
        near.shutdown(socket.SHUT_WR)
        with suppress(ProtocolError, ConnectionLost):
            restorer.read()
        assert not restorer.handed  # /dev/null is no userfaultfd
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_last_word_is_seen_and_not_taken() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert not has_finished(far)
        near.send(struct.pack("<I", FINISHED)[:3])
        assert not has_finished(far)
        near.send(struct.pack("<I", FINISHED)[3:])
        assert has_finished(far)
        assert has_finished(far)
        assert not forestall(far.fileno())
        assert has_finished(far)


def test_who_gives_up_first_is_sure() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert forestall(far.fileno())
        with pytest.raises(BrokenPipeError):
            near.send(struct.pack("<I", FINISHED))


def test_another_word_is_none() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.send(b"RSTF")
        with pytest.raises(ProtocolError, match="52535446"):
            has_finished(far)
        near.close()
    with far, pytest.raises(ConnectionLost):
        has_finished(far)
