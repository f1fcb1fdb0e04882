"""A forecast survives being images, what it says need not be said again, and a broken one is an ImageError."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ImageError
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.files import EXTRAS
from lazyproc.images.forecast import (
    Forecast,
    Room,
    bare_task,
    can_be_foreseen,
    can_be_opened,
    forecast_images,
    part,
    read_forecast,
)
from lazyproc.images.memory import Behind, WrittenMappings, access_modes, write_mappings
from lazyproc.model import Checkpoint, OpenFile, Task
from tests.unit.model_strategies import HEAVY, checkpoints


def _foreseen(task: Task, files: Mapping[int, OpenFile]) -> Task:
    vmas = task.mm.vmas if task.mm and can_be_foreseen(task.mm.vmas, files) else None
    stack = task.mm.start_stack if task.mm and vmas is not None else 0
    return bare_task((task.vpid, task.ppid, task.pgid, task.sid), task.exit_signal, vmas, stack)


def _forecast(checkpoint: Checkpoint) -> Forecast:
    """What could have been said of it before."""
    openable = {number: file for number, file in checkpoint.files.items() if can_be_opened(file)}
    tasks = tuple(_foreseen(task, openable) for task in checkpoint.tasks)
    behind = {vma.file_id for task in tasks if task.mm for vma in task.mm.vmas}
    files = {number: file for number, file in openable.items() if number in behind}
    return Forecast(part(tasks, files), {task.vpid: Room.of(task) for task in checkpoint.tasks})


def _written(checkpoint: Checkpoint, forecast: Forecast) -> list[WrittenMappings]:
    modes = access_modes(checkpoint.files)
    found = [task.mm for task in checkpoint.tasks if task.mm and task.vpid in forecast.mappings]
    return [write_mappings(mm.vmas, mm.start_stack, Behind(modes, {}, {})) for mm in found]


@HEAVY
@given(checkpoints())
def test_a_forecast_comes_back_from_its_images(checkpoint: Checkpoint) -> None:
    forecast = _forecast(checkpoint)
    images = forecast_images(forecast)
    assert forecast_images(forecast, _written(checkpoint, forecast)) == images
    assert read_forecast(images) == forecast


@HEAVY
@given(checkpoints())
def test_what_was_foreseen_is_not_said_again(checkpoint: Checkpoint) -> None:
    forecast = _forecast(checkpoint)
    written, mappings = _written(checkpoint, forecast), forecast.mappings
    images = to_images(checkpoint, written=written, foreseen=mappings)
    assert from_images(images, mappings) == checkpoint
    if any(mappings.values()):
        assert sum(map(len, images.values())) < sum(map(len, to_images(checkpoint).values()))
    if mappings:
        with pytest.raises(ImageError, match="foreseen"):
            from_images(images)


@HEAVY
@given(checkpoints(), st.data())
def test_a_broken_forecast_is_refused(checkpoint: Checkpoint, data: st.DataObject) -> None:
    images = forecast_images(_forecast(checkpoint))
    name = data.draw(st.sampled_from(sorted(images)))
    broken = bytearray(images[name])
    at = data.draw(st.integers(0, len(broken) - 1))
    broken[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        read_forecast({**images, name: bytes(broken[: data.draw(st.integers(0, len(broken)))])})


@HEAVY
@given(checkpoints())
def test_every_process_needs_its_room(checkpoint: Checkpoint) -> None:
    images = forecast_images(_forecast(checkpoint))
    with pytest.raises(ImageError, match="room"):
        read_forecast({name: data for name, data in images.items() if name != EXTRAS})
