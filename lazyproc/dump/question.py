"""Questions that only the process itself can answer: remote calls, and what to make of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.tracee import Memory, Tracee

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """`answer` gets the results of `calls`, in order, and the memory where the calls have left their output."""

    calls: tuple[Call, ...]
    answer: Callable[[Sequence[int], Memory], T]


def ask(
    bench: Bench, asked: Sequence[tuple[Tracee, int, Sequence[Question[object]]]]
) -> list[list[object]]:
    """Ask several threads (each with its dead man's frame) at the same time; the answers in the order of asking."""
    results = bench.run_all(
        [(tracee, [call for q in questions for call in q.calls], frame) for tracee, frame, questions in asked]
    )
    answers = []
    for (_, _, questions), row in zip(asked, results, strict=True):
        taken = iter(row)
        answers.append([q.answer([next(taken) for _ in q.calls], bench.memory) for q in questions])
    return answers
