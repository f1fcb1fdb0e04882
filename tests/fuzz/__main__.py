"""One parser, driven by atheris (libFuzzer for Python): `python -m tests.fuzz TARGET CORPUS [libFuzzer's options]`.

Ends with exit status 0 after `-runs`; otherwise the input that broke it lies where -artifact_prefix says.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["lazyproc"]):
    from lazyproc.errors import ImageError, ProtocolError
    from tests.fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv[1]]

    def once(data: bytes) -> None:
        try:
            target(data)
        except (ProtocolError, ImageError):
            return

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
