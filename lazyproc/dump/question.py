"""Questions that only the process itself can answer: remote calls, and what to make of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lazyproc.facts import dataclass
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.tracee import Tracee

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Question(Generic[T_co]):
    """`answer` gets the results of `calls`, in order; what they have written is read from the bench."""

    calls: tuple[Call, ...]
    answer: Callable[[Sequence[int]], T_co]


def ask(bench: Bench, asked: Sequence[tuple[Tracee, Sequence[Question[object]]]]) -> list[list[object]]:
    """Ask several threads at the same time; the answers in the order of asking."""
    programs = [(tracee, [call for q in questions for call in q.calls]) for tracee, questions in asked]
    answers = []
    for (_, questions), results in zip(asked, bench.run_all(programs), strict=True):
        taken = iter(results)
        answers.append([q.answer([next(taken) for _ in q.calls]) for q in questions])
    return answers
