"""Signals that come to a frozen tree, as COMMIT has them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.late import Late, LateSignal
from lazyproc.model import Checkpoint, Registers
from tests.unit.model_strategies import HEAVY, checkpoints, siginfo

words = st.integers(0, 2**64 - 1)
registers = st.lists(words, min_size=27, max_size=27).map(lambda row: Registers(*row))
signals = st.builds(LateSignal, st.integers(1, 9), st.integers(0, 9), siginfo)
FINE: dict[str, Any] = Late((LateSignal(1, 0, bytes(128)),), {1: Registers(*range(27))}).fields()


@given(st.lists(signals, min_size=1, max_size=5), st.dictionaries(st.integers(1, 9), registers, max_size=3))
def test_what_was_said_is_heard(sent: list[LateSignal], ended: dict[int, Registers]) -> None:
    late = Late(tuple(sent), ended)
    assert Late.of(json.loads(json.dumps(late.fields()))) == late


def test_nothing_is_said_of_nothing() -> None:
    assert Late().fields() == {}
    assert Late.of({}) == Late.of({"what": "a later revision says"}) == Late()


@pytest.mark.parametrize(
    "fields",
    [
        {"signals": FINE["signals"]},
        {**FINE, "signals": [[1, 0]]},
        {**FINE, "signals": [[1, 0, "00" * 127]]},
        {**FINE, "signals": [[1, 0, "no number"]]},
        {**FINE, "signals": [[None, 0, "00" * 128]]},
        {**FINE, "signals": 7},
        {**FINE, "registers": [[1, *range(26)]]},
        {**FINE, "registers": [[1, *range(26), 1 << 64]]},
        {**FINE, "registers": [[1, *range(26), -1]]},
        {**FINE, "registers": [[]]},
    ],
)
def test_what_is_no_signal(fields: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Late.of(fields)


@HEAVY
@given(checkpoints(), st.data())
def test_they_come_behind_what_was_pending(checkpoint: Checkpoint, data: st.DataObject) -> None:
    task = checkpoint.root
    thread = task.leader
    infos = data.draw(st.lists(siginfo, min_size=2, max_size=2))
    late = Late((LateSignal(task.vpid, 0, infos[0]), LateSignal(task.vpid, thread.tid, infos[1])), {})
    after = late.added_to(checkpoint).root
    assert after.pending == (*task.pending, infos[0])
    assert after.leader.pending == (*thread.pending, infos[1])
    assert (after.leader.registers, after.leader.restart) == (thread.registers, thread.restart)


@HEAVY
@given(checkpoints(), registers)
def test_a_call_that_they_end_sleeps_no_more(checkpoint: Checkpoint, ended: Registers) -> None:
    thread = checkpoint.root.leader
    late = Late((LateSignal(checkpoint.root.vpid, 0, bytes(128)),), {thread.tid: ended})
    after = late.added_to(checkpoint).root.leader
    assert (after.registers, after.restart) == (ended, None)
