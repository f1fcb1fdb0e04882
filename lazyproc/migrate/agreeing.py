"""What both sides have agreed on when the source may stop the tree; meanwhile each makes itself ready."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lazyproc.dump.before import Before
from lazyproc.errors import LazyprocError
from lazyproc.events import Listener
from lazyproc.images.files import pack
from lazyproc.images.forecast import forecast_images
from lazyproc.migrate.asking import asked, begin_trace
from lazyproc.migrate.description import Reader
from lazyproc.migrate.practice import practise
from lazyproc.migrate.prepare import offer_of
from lazyproc.migrate.talk import Unfit
from lazyproc.pages.channel import Channel
from lazyproc.trace import TraceFile
from lazyproc.wire.native import FORESEES


def agreed(
    session: str,
    control: Channel,
    before: Before,
    order: Mapping[str, str | int | bool],
    trace: TraceFile | None,
    listener: Listener,
) -> Reader:
    """For whom the tree is to be described: the destination takes it in, and keeps the `order`.

    Raises Unfit with all that stands in the way there, LazyprocError for what it does not know; see `asked`.
    """
    reader, forecast = _briefed(before, control.peer_revision)
    answer = asked(
        control,
        offer_of(before.smaps),
        before.wanted,
        {**order, "trace": trace is not None},
        listener,
        forecast=forecast,
        meanwhile=partial(practise, connected=bool(before.flows)),
    )
    if isinstance(answer, tuple):
        raise Unfit(answer)
    if order["release"] and answer.fields.get("release") is not True:
        raise LazyprocError(
            "the receiver acknowledges no pages",
            where=control.peer,
            remedy="update it, or leave out --release",
        )
    if trace is not None:
        begin_trace(trace, session, control.peer, answer)
    return reader


def _briefed(before: Before, revision: int) -> tuple[Reader, bytes | None]:
    """Whom that revision of the protocol makes of the destination, and what it is told of the tree while that runs."""
    if before.forecast is None or revision < FORESEES:
        return Reader(revision, before.written), None
    forecast = pack(forecast_images(before.forecast, before.written))
    return Reader(revision, before.written, frozenset(before.forecast.mappings)), forecast
