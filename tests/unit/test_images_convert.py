"""Checkpoints survive being images, whatever is in them, and broken images are nothing but ImageErrors."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyproc.errors import ImageError
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.files import EXTRAS, pack, unpack
from lazyproc.model import Checkpoint
from tests.unit.model_strategies import checkpoints

HEAVY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@HEAVY
@given(checkpoints())
def test_a_checkpoint_comes_back_from_its_images(checkpoint: Checkpoint) -> None:
    assert from_images(to_images(checkpoint)) == checkpoint
