"""The command line of a QEMU that is to take guests in."""

from __future__ import annotations

import pytest

from lazyproc.errors import UsageError
from lazyproc.qemu.shell import demand_command


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("/no/such/qemu", "-m", "64"), "no program"),
        (("true", "-daemonize"), "-daemonize is not wanted"),
        (("true", "--incoming", "defer"), "--incoming is not wanted"),
    ],
)
def test_what_cannot_take_a_guest_in_is_refused(command: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        demand_command(command)


def test_other_words_are_left_to_qemu() -> None:
    demand_command(("true", "-name", "incoming", "-nodefaults"))
