"""What two hosts tell each other about themselves (ASK and HOST), and whether they fit together."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

from lazyproc.errors import ProtocolError
from lazyproc.facts import asdict, dataclass
from lazyproc.host_check import Finding, State, check_host
from lazyproc.kernel import cpu
from lazyproc.migrate.prepare import OTHER_PROCESSOR, OTHER_VDSO, cpu_text, vdso_build_id
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Host


@dataclass(frozen=True, slots=True)
class About:
    """A host as it describes itself."""

    kernel: str
    cpu: Mapping[str, int]  # feature words by name
    vdso: str  # build id, hexadecimal
    findings: tuple[Finding, ...]


def about_here() -> About:
    """This host. Tries everything that `lazyproc check` tries: some 20 ms."""
    return About(platform.release(), cpu.features(), vdso_build_id().hex(), check_host())


def host_frame() -> Host:
    here = about_here()
    findings: list[JsonValue] = [{**asdict(each), "state": each.state.value} for each in here.findings]
    words: dict[str, JsonValue] = dict(here.cpu)
    return Host({"kernel": here.kernel, "cpu": words, "vdso": here.vdso, "findings": findings})


def about_in(frame: Host) -> About:
    """Raises ProtocolError."""
    kernel, words, vdso, rows = (frame.fields.get(name) for name in ("kernel", "cpu", "vdso", "findings"))
    if not (isinstance(kernel, str) and isinstance(words, dict) and isinstance(vdso, str)):
        raise ProtocolError("HOST lacks kernel, cpu or vdso")
    if not isinstance(rows, list):
        raise ProtocolError("HOST lacks findings")
    numbers = {name: word for name, word in words.items() if isinstance(word, int)}
    return About(kernel, numbers, vdso, tuple(map(_finding, rows)))


def _finding(row: JsonValue) -> Finding:
    match row:
        case {"name": str(name), "state": str(state), "detail": str(detail), "remedy": str(remedy)}:
            if state in {each.value for each in State}:
                return Finding(name, State(state), detail, remedy)
    raise ProtocolError("HOST has a finding that is none")


def fit(source: About, destination: About) -> Iterator[Finding]:
    """Whether processes of the source can run on the destination; then what that host has found of itself. Pure."""
    lacking = cpu.missing(source.cpu, destination.cpu)
    if lacking:
        detail = f"lacks what programs here may use ({cpu_text(lacking)})"
        yield Finding("peer: processor", State.MISSING, detail, OTHER_PROCESSOR)
    else:
        yield Finding("peer: processor", State.OK, "has all that programs here may use")
    if source.vdso == destination.vdso:
        yield Finding("peer: vdso", State.OK, "is the same")
    else:
        detail = f"is another ({destination.kernel} there, {source.kernel} here)"
        yield Finding("peer: vdso", State.MISSING, detail, OTHER_VDSO)
    for finding in destination.findings:
        yield Finding(f"peer: {finding.name}", finding.state, finding.detail, finding.remedy)
