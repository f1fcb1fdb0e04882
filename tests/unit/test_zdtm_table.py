"""What is made of the output of CRIU's test driver, and of its results."""

from __future__ import annotations

import pytest

from tests.interop.zdtm.runs import (
    BROKEN,
    FAIL,
    PASS,
    REFUSED,
    SKIP,
    UNRESTORED,
    UNSTARTED,
    WRONG,
    Result,
    judged,
)
from tests.interop.zdtm.table import DOCS, baseline, sections, with_sections

_DUMP = """Start test
Run criu dump
=[log]=> dump/zdtm/static/x/66/1/dump.log
------------------------ grep Error ------------------------
b'(00.020119) Error (lazyproc): pid 66: fd 4: is odd; close it'
------------------------ ERROR OVER ------------------------
################## Test zdtm/static/x FAIL at CRIU dump ##################
"""
_RESTORE = _DUMP.replace("dump", "restore").replace("pid 66: ", "mapping 0x7f0012345000-0x7f0012346000: ")
_WRONG = """Start test
########## Test zdtm/static/x FAIL at result check ###########
Test output: ================================
18:03:01.047:    65: FAIL: x.c:105: A page is not shared (errno = 11)
"""
_UNSTARTED = """Start test
Test zdtm/static/x FAIL at ['make', '-C', 'zdtm/static', 'x.pid']
18:03:01.047:    66: SKIP: x.c:60: only for ARM
"""


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("=== Test zdtm/static/x PASS ===\n", 0, Result(PASS)),
        ("Skipping zdtm/static/x (no tun feature)\n", 0, Result(SKIP, reason="no tun feature")),
        (_DUMP, 1, Result(FAIL, REFUSED, "CRIU dump: fd 4: is odd; close it")),
        (_RESTORE, 1, Result(FAIL, UNRESTORED, "CRIU restore: mapping 0x…: fd 4: is odd; close it")),
        (_WRONG, 1, Result(FAIL, WRONG, "result check: FAIL: x.c:105: A page is not shared (errno = 11)")),
        (_UNSTARTED, 1, Result(FAIL, UNSTARTED, "['make', '-C', 'zdtm/static', 'x.pid']: SKIP: x.c:60: only for ARM")),
        ("nothing\nOSError: broken\n", 1, Result(FAIL, BROKEN, "OSError: broken")),
    ],
)  # fmt: skip
def test_output_is_judged(output: str, status: int, expected: Result) -> None:
    assert judged(output, status) == expected


def test_the_document_has_the_newest_tables() -> None:
    text = (DOCS / "criu.md").read_text()
    assert with_sections(text, sections()) == text, "run python -m tests.interop.zdtm.table"


def test_the_baseline_has_every_test_once() -> None:
    assert len(baseline()) == 480
