"""Writes the Python modules of the messages: `python proto/generate.py [FOLDER]`.

Needs grpcio-tools and mypy-protobuf, both in the `dev` extra. The modules are committed, so that nobody needs
protoc to build or run; a test runs this into a scratch folder and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGE = "lazyproc/images/pb"


def generate(target: Path) -> None:
    """Writes PACKAGE/*_pb2.py and .pyi under `target`; raises SystemExit when protoc refuses."""
    (target / PACKAGE).mkdir(parents=True, exist_ok=True)
    # The virtual folder gives the modules their place in the package, so their imports of each other resolve.
    status = protoc.main(
        [
            "protoc",
            f"-I{PACKAGE}={HERE}",
            f"--python_out={target}",
            f"--mypy_out={target}",
            *(f"{PACKAGE}/{path.name}" for path in sorted(HERE.glob("*.proto"))),
        ]
    )
    if status:
        raise SystemExit(f"protoc ended with {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent)
