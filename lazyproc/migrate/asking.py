"""The source's questions before the freeze: may this tree come, and what stands in its way there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lazyproc.errors import LazyprocError, Obstacle
from lazyproc.events import Listener, Note
from lazyproc.migrate.needs import needs_frame, obstacles_in
from lazyproc.migrate.prepare import Offer
from lazyproc.migrate.serving import number_in
from lazyproc.migrate.talk import checked, expect
from lazyproc.needs import Wanted
from lazyproc.pages.channel import Channel
from lazyproc.trace import Clock, TraceFile
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Abort, Control, Forecast, Obstacles, Prepare, Prepared

PREPARE_S = 30.0
ONLY_ASKED = Abort({"reason": "only asked"})


def obstacles_there(
    control: Channel,
    offer: Offer,
    wanted: Sequence[Wanted],
    order: Mapping[str, JsonValue],
    listener: Listener,
) -> tuple[Obstacle, ...]:
    """What at the destination stands in the way of the tree; when nothing does, it is ready for the images."""
    answer = asked(control, offer, wanted, order, listener)
    return answer if isinstance(answer, tuple) else ()


def asked(
    control: Channel,
    offer: Offer,
    wanted: Sequence[Wanted],
    order: Mapping[str, JsonValue],
    listener: Listener,
    *,
    forecast: bytes | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Prepared | tuple[Obstacle, ...]:
    """The destination's answer to PREPARE: that it is ready for the images, or all that stands in the way. `meanwhile`
    is called while it is looked for; `forecast` is for destinations that know what it is.

    Raises Refused with the reason of a destination that is too old to list obstacles, ConnectionLost, ProtocolError.
    """
    if control.peer_revision:
        frame, left_out = needs_frame(wanted)
        control.send(frame)
        if left_out:
            listener(Note(f"{left_out} needs of the tree are not checked beforehand: there are too many"))
    else:
        listener(Note(f"{control.peer}: is an older lazyproc, which looks at memory and processor only"))
    if forecast is not None:
        control.send(Forecast(forecast))
    control.send(Prepare({**offer.fields(), **order}))
    meanwhile()
    answer = expect(control, Control, PREPARE_S)
    if isinstance(answer, Obstacles):
        return obstacles_in(answer, control.peer)
    return checked(answer, Prepared, control)


def begin_trace(trace: TraceFile, session: str, peer: str, answer: Prepared) -> None:
    clock = answer.fields.get("trace")
    if not isinstance(clock, dict):
        raise LazyprocError(
            "the receiver sends no trace", where=peer, remedy="update it, or leave out --trace"
        )
    trace.begin(session, Clock(number_in(clock, "monotonic_ns"), number_in(clock, "realtime_ns")))
