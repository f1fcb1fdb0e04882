"""Checksums of images: every bit counts, and none are needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ImageError
from lazyproc.images.files import SUMS
from lazyproc.images.sums import check_sums, sums_of

NAMES = ["pstree.img", "core-1.img", "files.img", "lazyproc.img"]
images_of_any_kind = st.dictionaries(st.sampled_from(NAMES), st.binary(min_size=1), min_size=1)


@given(images=images_of_any_kind, data=st.data())
def test_an_image_with_another_bit_is_named(images: dict[str, bytes], data: st.DataObject) -> None:
    whole = images | sums_of(images)
    check_sums(whole)
    name = data.draw(st.sampled_from(sorted(images)))
    at = data.draw(st.integers(0, len(images[name]) * 8 - 1))
    changed = bytearray(images[name])
    changed[at // 8] ^= 1 << at % 8
    words = f"^{name}: is not what was written .*copy the folder again.*remove {SUMS}$"
    with pytest.raises(ImageError, match=words):
        check_sums(whole | {name: bytes(changed)})
    check_sums(images | {name: bytes(changed)})


@given(images=images_of_any_kind, data=st.data())
def test_an_image_that_is_missing_is_named(images: dict[str, bytes], data: st.DataObject) -> None:
    whole = images | sums_of(images)
    name = data.draw(st.sampled_from(sorted(images)))
    del whole[name]
    with pytest.raises(ImageError, match=f"^{name}: missing"):
        check_sums(whole)


def test_others_may_stand_beside_them() -> None:
    images = {"pstree.img": b"p"}
    check_sums(images | sums_of(images) | {"filelocks.img": b"of criu"})
