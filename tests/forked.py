"""Work in a forked child, which never goes on as a second test session, whatever happens in it."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

NOBODY = 65534


@contextmanager
def ending() -> Iterator[None]:
    """All that a child does after its fork: it ends with the block, with 1 when that raised."""
    try:
        yield
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def become_nobody() -> None:
    """Without privileges for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def in_child(work: Callable[[], T]) -> T:
    """What `work` returns, or raises, in a child; AssertionError when that ends without a word."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with ending():
            os.write(writing, pickle.dumps(_outcome(work)))
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert told, f"the child has ended with {status}"
    result, error = pickle.loads(told)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:
        return None, error
