"""The entry points of `lazyproc` and `lazyproc-criu`. Half of a short command is Python importing modules, and whoever
interrupts that has interrupted nothing yet: it ends by the signal, as it does by SIGTERM, without a traceback.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # signal imports enum, 3 ms in which this would not hold yet


def lazyproc() -> int:
    """Its exit code."""
    _die_of_an_interrupt()
    from lazyproc.cli.main import main

    return main()


def criu() -> int:
    """Its exit code."""
    _die_of_an_interrupt()
    from lazyproc.criu.main import main

    return main()


def _die_of_an_interrupt() -> None:
    """Until somebody listens who can undo what has begun; one that is ignored (nohup(1)) stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
