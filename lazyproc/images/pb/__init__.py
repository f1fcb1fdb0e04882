"""The generated messages, and a way to import them that costs a quarter less.

protobuf imports its implementation in pure Python (python_message, and with it text_format, pickle, decoders...) also
where the one in C does all the work: 10 ms of every start. Imported lazily, it is loaded when somebody first looks
into it; that is nobody, or protobuf itself on a host without its C module.
"""

from __future__ import annotations

import signal
import sys
from importlib.util import LazyLoader, find_spec, module_from_spec

_PURE_PYTHON = "google.protobuf.internal.python_message"


def import_lazily(name: str) -> None:
    """What `import name` does, but the code runs at the first access to an attribute. No such module: nothing.

    The recipe is that of importlib's documentation. A module that is imported already is left alone.
    """
    if name in sys.modules:
        return
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # of the package above it
        return
    if spec is None or spec.loader is None:
        return
    spec.loader = LazyLoader(spec.loader)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    package, _, own_name = name.rpartition(".")
    setattr(sys.modules[package], own_name, module)  # or `from package import name` would import it once more


# A KeyboardInterrupt while protobuf's C module builds descriptors is a segmentation fault (seen in 2 of 300 interrupts).
_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
try:
    import_lazily(_PURE_PYTHON)
    from lazyproc.images.pb import files_pb2, lazyproc_pb2, process_pb2
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before)

__all__ = ["files_pb2", "import_lazily", "lazyproc_pb2", "process_pb2"]
