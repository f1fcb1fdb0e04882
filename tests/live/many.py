"""Runs lazyproc command lines, each in a fork of a process that has imported everything: hundreds in seconds.

A list of them comes as JSON on standard input, a list of [exit code, standard output, standard error] goes to standard
output. Trees that were restored (`--json` names their root) are killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from typing import TypedDict

from lazyproc.cli.main import main
from lazyproc.restore import run as _imported_beforehand

LIMIT_S = 20


class Done(TypedDict):
    code: int
    out: str
    err: str


def run(argv: list[str]) -> Done:
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    child = os.fork()
    if not child:
        signal.alarm(LIMIT_S)
        os.dup2(out, 1)
        os.dup2(err, 2)
        code = 1
        try:
            code = main(argv)
        except SystemExit as usage:
            code = int(usage.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done = Done(code=code, out=_text(out), err=_text(err))
    if code == 0 and done["out"]:
        with suppress(ProcessLookupError):
            os.kill(json.loads(done["out"])["root_pid"], signal.SIGKILL)
    return done


def _text(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(fd) as file:
        return file.read()


if __name__ == "__main__":
    assert _imported_beforehand
    json.dump([run(argv) for argv in json.load(sys.stdin)], sys.stdout)
