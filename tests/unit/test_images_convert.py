"""Checkpoints survive being images, whatever is in them, and broken images are nothing but ImageErrors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyproc.errors import ImageError
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.files import EXTRAS, ImageWriter, pack, record, records, unpack
from lazyproc.images.memory import Behind, WrittenMappings, access_modes, write_mappings
from lazyproc.images.openfiles import MEMBERS
from lazyproc.images.pagemap import merge
from lazyproc.images.pb import files_pb2 as files_pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.images.sockets import read_inet
from lazyproc.model import Checkpoint, Epoll, Limit, SharedKind, Task, VmaKind
from tests.unit.model_strategies import HEAVY, checkpoints


def _criu_could_have_written_it(checkpoint: Checkpoint) -> bool:
    """Without SysV memory, which it has only for ipc namespaces, and without epoll targets that nobody holds."""
    return all(memory.kind is not SharedKind.SYSV for memory in checkpoint.shared.values()) and not any(
        isinstance(file.resource, Epoll) and file.resource.targets for file in checkpoint.files.values()
    )


@HEAVY
@given(checkpoints())
def test_a_checkpoint_comes_back_from_its_images(checkpoint: Checkpoint) -> None:
    assert from_images(unpack(pack(to_images(checkpoint)))) == checkpoint


@HEAVY
@given(checkpoints())
def test_and_from_those_that_only_lazyproc_reads(checkpoint: Checkpoint) -> None:
    images = to_images(checkpoint, for_criu=False)
    assert from_images(unpack(pack(images))) == checkpoint
    extras = record(images, EXTRAS, own.Extras)
    for thread in extras.threads:
        thread.xsave = bytes(thread.xsave_size + 1)
    writer = ImageWriter()
    writer.add(EXTRAS, extras)
    with pytest.raises(ImageError, match="xsave"):
        from_images(images | writer.finish())


def _written(checkpoint: Checkpoint, *, other_modes: int = 0, further: int = 0) -> Iterator[WrittenMappings]:
    """The mappings of those who share no memory. Stale ones: a file was opened otherwise, the stack is elsewhere."""
    modes = {number: mode ^ other_modes for number, mode in access_modes(checkpoint.files).items()}
    for task in checkpoint.tasks:
        if task.mm is not None and all(vma.kind is not VmaKind.SHARED for vma in task.mm.vmas):
            yield write_mappings(task.mm.vmas, task.mm.start_stack + further, Behind(modes, {}, {}))


@HEAVY
@given(checkpoints())
def test_mappings_written_beforehand_change_nothing(checkpoint: Checkpoint) -> None:
    images = to_images(checkpoint)
    assert to_images(checkpoint, written=[*_written(checkpoint)]) == images
    assert to_images(checkpoint, written=[*_written(checkpoint, other_modes=1)]) == images
    assert to_images(checkpoint, written=[*_written(checkpoint, further=1 << 30)]) == images


@HEAVY
@given(checkpoints(), st.data())
def test_changed_bytes_are_an_image_error_or_another_checkpoint(
    checkpoint: Checkpoint, data: st.DataObject
) -> None:
    images = to_images(checkpoint)
    for _ in range(10):
        name = data.draw(st.sampled_from(sorted(images)))
        broken = bytearray(images[name])
        at = data.draw(st.integers(0, len(broken) - 1))
        if data.draw(st.booleans()):
            broken[at] ^= data.draw(st.integers(1, 255))
        else:
            del broken[at:]
        with contextlib.suppress(ImageError):
            assert isinstance(from_images(images | {name: bytes(broken)}), Checkpoint)


@HEAVY
@given(checkpoints(), st.data())
def test_a_missing_image_is_named(checkpoint: Checkpoint, data: st.DataObject) -> None:
    images = to_images(checkpoint)
    name = data.draw(st.sampled_from(sorted(images.keys() - {EXTRAS})))
    del images[name]
    with pytest.raises(ImageError, match=re.escape(f"{name}: missing")):
        from_images(images)


@HEAVY
@given(checkpoints().filter(_criu_could_have_written_it), st.data())
def test_memory_does_not_vanish_with_a_pagemap(checkpoint: Checkpoint, data: st.DataObject) -> None:
    images = to_images(checkpoint)
    del images[EXTRAS]  # as CRIU would have left it
    name = data.draw(st.sampled_from(sorted(name for name in images if name.startswith("pagemap-"))))
    del images[name]
    with pytest.raises(ImageError):
        from_images(images)


def _without_vector_state(task: Task) -> Task:
    """Random state may use components that CRIU does not save, which is refused."""
    return replace(task, threads=tuple(replace(thread, xsave=b"") for thread in task.threads))


@HEAVY
@given(checkpoints().filter(_criu_could_have_written_it))
def test_without_lazyproc_img_what_criu_knows_is_the_same(checkpoint: Checkpoint) -> None:
    images = to_images(replace(checkpoint, tasks=tuple(map(_without_vector_state, checkpoint.tasks))))
    del images[EXTRAS]
    plain = from_images(images)
    assert [task.vpid for task in plain.tasks] == [task.vpid for task in checkpoint.tasks]
    for task, original in zip(plain.tasks, checkpoint.tasks, strict=True):
        assert replace(task, threads=(), mm=None) == replace(
            original,
            threads=(),
            mm=None,
            exit_signal=task.exit_signal,
            xfeatures=0,
            mce_kill=2,
            cgroups=task.cgroups,
        )
        assert [thread.registers for thread in task.threads] == [
            thread.registers for thread in original.threads
        ]
        if task.mm and original.mm:
            kinds = {VmaKind.VVAR_VCLOCK: VmaKind.VVAR}
            assert {kinds.get(vma.kind, vma.kind) for vma in task.mm.vmas} == {
                kinds.get(vma.kind, vma.kind) for vma in original.mm.vmas
            }
    assert plain.files.keys() >= {item.file_id for task in plain.tasks for item in task.descriptors}
    assert plain.memory == checkpoint.memory


def _rewritten(images: dict[str, bytes], name: str, message: Message) -> dict[str, bytes]:
    """With an image that holds this record alone, and no checksums."""
    writer = ImageWriter()
    writer.add(name, message)
    return images | writer.finish()


@HEAVY
@given(checkpoints())
def test_filters_of_a_process_as_criu_had_them_before_3_11(checkpoint: Checkpoint) -> None:
    """Once for all threads, beside what belongs to the process."""
    images = to_images(checkpoint)
    for task in checkpoint.tasks:
        for thread in task.threads:
            name = f"core-{thread.tid}.img"
            core = record(images, name, pb.core_entry)
            if thread is task.leader:
                core.tc.old_seccomp_mode = core.thread_core.seccomp_mode
                if core.thread_core.HasField("seccomp_filter"):
                    core.tc.old_seccomp_filter = core.thread_core.seccomp_filter
            core.thread_core.ClearField("seccomp_mode")
            core.thread_core.ClearField("seccomp_filter")
            images = _rewritten(images, name, core)
    for task, found in zip(checkpoint.tasks, from_images(images).tasks, strict=True):
        for thread in found.threads:
            assert (thread.seccomp_mode, thread.seccomp) == (task.leader.seccomp_mode, task.leader.seccomp)


def test_options_of_tcp_as_criu_had_them_before_4() -> None:
    entry = files_pb.inet_sk_entry(ino=1, family=2, type=1, proto=6, state=1, src_addr=[1], dst_addr=[2])
    entry.opts.tcp_keepidle, entry.opts.tcp_keepintvl, entry.opts.tcp_keepcnt = 7, 8, 9
    stream = files_pb.tcp_stream_entry(
        inq_len=0, inq_seq=0, outq_len=0, outq_seq=0, opt_mask=0, snd_wscale=0, mss_clamp=0, nodelay=True
    )
    images = _rewritten({EXTRAS: b""}, "tcp-stream-1.img", stream)

    def numbers() -> dict[int, int]:
        options = read_inet(entry, own.FileExtra(id=1), (), images).options.values
        return {name: int.from_bytes(options.get((6, name), b""), "little") for name in (1, 3, 4, 5, 6)}

    assert numbers() == {1: 1, 3: 0, 4: 7, 5: 8, 6: 9}
    entry.tcp_opts.keepidle = 11
    assert numbers()[4] == 11


@settings(HEAVY, max_examples=5)
@given(checkpoints())
def test_images_from_before_vector_state_was_asked_for(checkpoint: Checkpoint) -> None:
    images = to_images(checkpoint)
    extras = record(images, EXTRAS, own.Extras)
    for extra in extras.tasks:
        extra.ClearField("xfeatures")
    writer = ImageWriter()
    writer.add(EXTRAS, extras)
    tasks = tuple(replace(task, xfeatures=0) for task in checkpoint.tasks)
    assert from_images(images | writer.finish()) == replace(checkpoint, tasks=tasks)


@settings(HEAVY, max_examples=3)
@given(checkpoints())
def test_descriptors_and_owners_that_cannot_be(checkpoint: Checkpoint) -> None:
    """The image is named, and its field."""
    images = to_images(checkpoint)

    def changed(name: str, kind: type[Message], change: Callable[[Any], object]) -> dict[str, bytes]:
        writer = ImageWriter()
        for entry, _ in records(images, name, kind):
            change(entry)
            writer.add(name, entry)
        return images | writer.finish()

    with pytest.raises(ImageError, match=r"fdinfo-2.img, offset \d+: fd is 4294967295"):
        from_images(
            changed("fdinfo-2.img", files_pb.fdinfo_entry, lambda entry: setattr(entry, "fd", 2**32 - 1))
        )
    for field, value in (("signum", 65), ("pid_type", 3), ("pid", 2**31)):

        def change(entry: Any, field: str = field, value: int = value) -> None:
            if entry.type != files_pb.FIFO:  # its path has the owner
                setattr(getattr(entry, MEMBERS[entry.type]).fown, field, value)

        with pytest.raises(ImageError, match=rf"files.img, file \d+: fown\..*{value}"):
            from_images(changed("files.img", files_pb.file_entry, change))


@settings(HEAVY, max_examples=10)
@given(checkpoints())
def test_lazy_pages_can_be_elsewhere(checkpoint: Checkpoint) -> None:
    there = from_images(to_images(checkpoint, lazy_elsewhere=True))
    assert there.memory == {obj: merge(extents) for obj, extents in checkpoint.memory.items()}


@given(checkpoints())
@settings(HEAVY, max_examples=1)
def test_limits_with_a_gap_are_refused(checkpoint: Checkpoint) -> None:
    gap = replace(checkpoint.root, limits=(Limit(3, 1, 1),))
    with pytest.raises(ImageError, match="resource limits"):
        to_images(replace(checkpoint, tasks=(gap, *checkpoint.tasks[1:])))
