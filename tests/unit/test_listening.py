"""What a command does with signals."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The signal comes where no exception can be raised, as between the bytecodes of importlib's callbacks.
PROGRAM = """
import argparse, os, signal, sys, time, weakref
from lazyproc.cli.listening import listening

class Thing:
    pass

def callback(_):
    os.kill(os.getpid(), int(sys.argv[1]))
    for _ in range(1000):  # here Python runs its handler
        pass

hook = sys.unraisablehook
try:
    with listening(argparse.Namespace(verbose=False, log_file=None, settled=False)):
        thing = Thing()
        kept = weakref.ref(thing, callback)
        del thing
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
assert sys.unraisablehook is hook
assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_that_python_has_dropped_comes_again(number: signal.Signals) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(int(number))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, preexec_fn=_heard)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def _heard() -> None:
    """Also where pytest was started in the background of a script, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
