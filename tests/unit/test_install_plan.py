"""The plan that moves received descriptors to their numbers, against a simulated descriptor table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyproc.model import Descriptor
from lazyproc.restore.install import SCM_MAX_FD, Close, Dup3, Op, SetFd, install_plan, messages


@st.composite
def tables(draw: st.DrawFn, limit: int = 40) -> list[Descriptor]:
    """Descriptor tables in any order, dense and sparse; several numbers may name one file."""
    numbers = draw(st.lists(st.integers(0, 60) | st.integers(0, 100_000), unique=True, max_size=limit))
    return [Descriptor(fd, draw(st.integers(1, 5)), draw(st.booleans())) for fd in numbers]


class Table:
    """What the kernel does, and what would go unnoticed there: overwriting a descriptor still to be moved."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[int, bool]] = {}  # number -> (file id, close-on-exec)

    def receive(self, file_ids: list[int]) -> None:
        assert len(file_ids) <= SCM_MAX_FD
        for file_id in file_ids:
            number = next(n for n in range(len(self.open) + 1) if n not in self.open)
            self.open[number] = (file_id, False)

    def run(self, op: Op) -> None:
        match op:
            case Dup3(old, new, cloexec):
                assert old != new, "EINVAL"
                assert new not in self.open, f"{new} is overwritten"
                self.open[new] = (self.open[old][0], cloexec)
            case Close(fd):
                del self.open[fd]
            case SetFd(fd, cloexec):
                self.open[fd] = (self.open[fd][0], cloexec)


@given(tables())
def test_everything_ends_where_it_was(descriptors: list[Descriptor]) -> None:
    table = Table()
    for message in messages(descriptors):
        table.receive(message)
    for op in install_plan(descriptors):
        table.run(op)
    assert table.open == {d.fd: (d.file_id, d.cloexec) for d in descriptors}


def test_more_than_one_message() -> None:
    descriptors = [Descriptor(3 * n, n + 1, False) for n in range(2 * SCM_MAX_FD + 1)]
    assert [len(message) for message in messages(descriptors)] == [SCM_MAX_FD, SCM_MAX_FD, 1]
    table = Table()
    for message in messages(descriptors):
        table.receive(message)
    for op in install_plan(descriptors):
        table.run(op)
    assert table.open == {d.fd: (d.file_id, False) for d in descriptors}


def test_nothing_to_install() -> None:
    assert messages([]) == []
    assert install_plan([]) == []
