"""Sub-packages that can be called like the public function of the same name.

`lazyproc.restore` and `lazyproc.migrate` are both: importing anything from such a sub-package binds its name in
`lazyproc`, over any function put there, so the sub-package itself has to answer the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType


def make_callable(package: str, module: str) -> None:
    """Let calls of `package` ("lazyproc.restore") go to the function of its own name in `module`, imported then."""

    class CallablePackage(ModuleType):
        def __call__(self, *args: object, **options: object) -> object:
            return self.__wrapped__(*args, **options)

        @property
        def __wrapped__(self) -> Callable[..., object]:
            """Where inspect.signature looks, and so whoever asks for help."""
            function: Callable[..., object] = getattr(import_module(module), package.rpartition(".")[2])
            return function

    sys.modules[package].__class__ = CallablePackage
