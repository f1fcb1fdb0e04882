"""The source is gone for good after the hand-over: the tree waits, and the operator ends it, completes it from images,
or gives up what is missing. No page is ever read that was not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.facts import replace
from lazyproc.hosts import Pair
from lazyproc.images.convert import from_images, memory_objects, to_images
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder
from lazyproc.kernel import proc
from lazyproc.model import ObjectKind
from lazyproc.pages.images import ImagePages, write_pages
from tests.faults.helpers import DESTINATION, gone, journal, journals, kill
from tests.faults.lost import (
    ALL_RIGHT,
    CHILD,
    FIRST,
    FORK,
    LATE,
    PAGES,
    ROOT,
    TOUCH_ALL,
    Found,
    Lost,
    lost,
    program_of,
)
from tests.faults.test_helpers_killed import waits_for_a_page
from tests.live.moving import checkpoint, receiving, run_cli
from tests.live.programs import running, wait_until
from tests.live.real import migrating

MOST_LOST = Found(FIRST, PAGES - FIRST, 0, FIRST, PAGES - FIRST, 0)


@pytest.fixture
def tree(pair: Pair) -> Iterator[Lost]:
    with lost(pair) as it:
        yield it


@pytest.fixture
def imaged(pair: Pair) -> Iterator[Lost]:
    with lost(pair, imaged=True) as it:
        yield it


def resume(it: Lost, *options: object, expected: int = 0) -> dict[str, object]:
    done = run_cli(it.pair.destination, "resume", it.session, *options, "--json", expected=expected)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def adds_up(report: dict[str, object]) -> bool:
    kinds = ("zero", "eager", "urgent", "bulk", "dropped", "poisoned")
    return report["pages_total"] == sum(int(str(report[f"pages_{kind}"])) for kind in kinds)


def orphan(it: Lost) -> None:
    kill(it.pair.destination, DESTINATION, "keeper", "pager", "guard")
    wait_until(lambda: it.info()["state"] == "orphaned", "nobody works on it")


# --- it waits -----------------------------------------------------------------------------------------------------


def test_it_waits_and_says_how_much_is_missing(tree: Lost) -> None:
    info = tree.info()
    assert info["state"] == "running"
    assert "source is lost" in str(info["reason"])
    missing = tree.missing()
    assert missing >= 3 * (PAGES - FIRST)
    assert missing <= int(str(info["pages_remaining"])) < missing + 200  # the C library's and the stacks'
    tree.order(TOUCH_ALL)
    wait_until(lambda: all(waits_for_a_page(pid) for pid in tree.pids()), "both wait")
    assert tree.info()["pages_remaining"] == info["pages_remaining"]


def test_a_pager_that_waits_for_its_source_sleeps(tree: Lost) -> None:
    """Its fault thread does; a connection whose end nobody hears of would wake it without end."""
    pager = tree.pair.destination.pid(journal(tree.pair.destination, DESTINATION)["pager_pid"])
    threads = [tid for tid in proc.task_ids(pager) if tid != pager]
    assert threads

    def switches() -> int:
        texts = [Path(f"/proc/{pager}/task/{tid}/status").read_text() for tid in threads]
        return sum(int(number) for text in texts for number in re.findall(r"ctxt_switches:\t(\d+)", text))

    def ticks() -> int:
        texts = [Path(f"/proc/{pager}/task/{tid}/stat").read_text() for tid in threads]
        return sum(int(number) for text in texts for number in text.rpartition(")")[2].split()[11:13])

    before, ticked = switches(), ticks()
    wait_until(lambda: switches() >= before + 4, "four looks for processes that have ended, of 250 ms each")
    assert ticks() - ticked < 25, "of a hundred to the second"


def test_its_end_is_the_end_of_the_waiting(tree: Lost) -> None:
    for pid in reversed(tree.pids()):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: journal(tree.pair.destination, DESTINATION)["state"] == "drained", "its end is noted")
    report = journal(tree.pair.destination, DESTINATION)["report"]
    assert report["ended"] is True
    assert adds_up(report)


# --- abort --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orphaned", [False, True])
def test_abort_ends_it_and_says_how_much_was_missing(tree: Lost, orphaned: bool) -> None:
    tree.order(FORK, LATE)
    pids = tree.pids()
    assert len(pids) == 3
    if orphaned:
        orphan(tree)
    missing = tree.info()["pages_remaining"]
    assert int(str(missing)) >= tree.missing() + PAGES - FIRST  # the late child's own
    done = run_cli(tree.pair.destination, "abort", tree.session, "--json", expected=5)
    answer = json.loads(done.stdout)
    assert (answer["role"], answer["pages_missing"]) == (DESTINATION, missing)
    assert f"{missing} of its pages were missing" in answer["text"]
    assert all(gone(pid) for pid in pids), "also what was forked since"
    assert not journals(tree.pair.destination, DESTINATION)
    assert [tree.found(worker).wrong for worker in (ROOT, CHILD, LATE)] == [0, 0, 0]
    assert [tree.found(worker).shared_wrong for worker in (ROOT, CHILD, LATE)] == [0, 0, 0]


# --- given up: SIGBUS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orphaned", [False, True])
def test_what_is_given_up_is_sigbus_in_every_process(tree: Lost, orphaned: bool) -> None:
    """Private and shared memory, of a root, its child, and a child that is forked when all is over."""
    if orphaned:
        orphan(tree)
    missing = int(str(tree.info()["pages_remaining"]))
    report = resume(tree, "--poison", expected=5)
    assert report["pages_poisoned"] == missing
    assert adds_up(report)
    info = tree.info()
    assert (info["state"], info["pages_remaining"]) == ("poisoned", 0)
    tree.order(TOUCH_ALL, ROOT, CHILD)
    assert (tree.found(ROOT), tree.found(CHILD)) == (MOST_LOST, MOST_LOST)


def test_a_thread_that_waits_and_a_child_forked_while_pages_were_missing(tree: Lost) -> None:
    tree.order(FORK, LATE)
    tree.order(TOUCH_ALL)
    wait_until(lambda: all(waits_for_a_page(pid) for pid in tree.pids()), "all three wait")
    assert resume(tree, "--poison", expected=5)["pages_poisoned"]
    tree.order(TOUCH_ALL, ROOT, CHILD, LATE)
    assert [tree.found(worker) for worker in (ROOT, CHILD, LATE)] == [MOST_LOST] * 3


@pytest.mark.parametrize("forked", ["before", "after"])
@pytest.mark.parametrize("names", [("pager",), ("keeper",), ("keeper", "pager", "guard")])
def test_shared_memory_stays_lost_for_whoever_is_forked_later(
    tree: Lost, names: tuple[str, ...], forked: str
) -> None:
    """Its marks are not inherited: a pager stays as long as the tree, and another one takes its place."""
    resume(tree, "--poison", expected=5)
    if forked == "before":
        tree.order(FORK, LATE)
    kill(tree.pair.destination, DESTINATION, *names)
    if len(names) == 3:
        wait_until(lambda: tree.info()["state"] == "orphaned", "nobody works on it")
        resume(tree, expected=5)
    if forked == "after":
        tree.order(FORK, LATE)
    tree.order(TOUCH_ALL, ROOT, CHILD, LATE)
    assert [tree.found(worker) for worker in (ROOT, CHILD, LATE)] == [MOST_LOST] * 3
    for pid in reversed(tree.pids()):  # some end with the root
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: journal(tree.pair.destination, DESTINATION)["state"] == "drained", "its end is noted")


def test_a_source_that_is_there_is_not_given_up_by_mistake(pair: Pair) -> None:
    with (
        program_of(pair) as program,
        receiving(pair.destination) as receiver,
        migrating(pair.source, receiver, program.pid, "--no-bulk") as journey,
    ):
        journey.wait_running()
        program.watch.wait_beats()
        session = journal(pair.destination, DESTINATION)["id"]
        done = run_cli(pair.destination, "resume", session, "--poison", expected=2)
        assert "its source is there" in done.stderr
        done = run_cli(pair.source, "resume", session, "--poison", expected=2)
        assert "for the destination" in done.stderr
        program.watch.wait_beats()
        run_cli(pair.destination, "abort", session, expected=5)
        run_cli(pair.source, "abort", session)


# --- completed from images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orphaned", [False, True])
def test_images_of_the_process_complete_it(imaged: Lost, orphaned: bool) -> None:
    if orphaned:
        orphan(imaged)
    else:
        imaged.order(FORK, LATE)  # no anchor holds its pages: the keeper must not let go of them
    report = resume(imaged, "--from", imaged.images)
    assert report["pages_poisoned"] == 0
    assert adds_up(report)
    if orphaned:
        imaged.order(FORK, LATE)
    imaged.order(TOUCH_ALL, ROOT, CHILD, LATE)
    assert [imaged.found(worker) for worker in (ROOT, CHILD, LATE)] == [ALL_RIGHT] * 3
    assert imaged.program.watch.read().errors == 0


def stays_as_it_was(it: Lost, directory: Path, code: int, *words: str, options: tuple[str, ...] = ()) -> None:
    before = it.info()
    done = run_cli(it.pair.destination, "resume", it.session, "--from", directory, *options, expected=code)
    assert all(word in done.stderr for word in words), done.stderr
    assert it.info() == before


def test_images_that_are_not_right_leave_it_as_it_was(imaged: Lost) -> None:
    pair, images = imaged.pair, imaged.images
    stays_as_it_was(imaged, pair.shared / "nowhere", 1, "nowhere")
    empty = pair.shared / "empty"
    empty.mkdir()
    stays_as_it_was(imaged, empty, 1, "inventory.img: missing")
    (empty / "inventory.img").write_bytes(b"nonsense")
    stays_as_it_was(imaged, empty, 1, "inventory.img")
    for name in ("pagemap-*.img", "pages-*.img", "core-*.img", "inventory.img"):
        broken = pair.shared / "broken"
        shutil.copytree(images, broken)
        found = sorted(broken.glob(name), key=lambda path: path.stat().st_size)[-1]
        os.truncate(found, found.stat().st_size // 2)
        stays_as_it_was(imaged, broken, 1, found.name)
        shutil.rmtree(broken)
    resume(imaged, "--from", images)
    imaged.order(TOUCH_ALL, ROOT, CHILD)
    assert [imaged.found(worker) for worker in (ROOT, CHILD)] == [ALL_RIGHT] * 2


def test_images_of_another_process_are_refused(tree: Lost) -> None:
    """Even of the same program."""
    pair, images = tree.pair, tree.pair.shared / "of another"
    (pair.shared / "more").mkdir()
    with running("lost", PAGES, directory=pair.shared / "more", host=pair.source) as other:
        other.watch.wait_beats()
        checkpoint(pair.source, other.pid, images, "--leave-running")
    stays_as_it_was(tree, images, 2, "of another process")
    stays_as_it_was(tree, images, 2, "of another process", options=("--force",))


def test_images_of_another_moment_need_force(pair: Pair) -> None:
    """They hold what the pages were then."""
    with lost(pair, imaged=True, moved_on=True) as it:
        stays_as_it_was(it, it.images, 2, "at another moment", "--force")
        resume(it, "--from", it.images, "--force")
        it.order(TOUCH_ALL, ROOT, CHILD)  # of this program nothing changes
        assert [it.found(worker) for worker in (ROOT, CHILD)] == [ALL_RIGHT] * 2


def test_what_images_lack_waits_and_can_be_given_up(imaged: Lost) -> None:
    """The shared memory is not in them."""
    partial = imaged.pair.shared / "partial"
    without_shared(imaged.images, partial)
    done = run_cli(imaged.pair.destination, "resume", imaged.session, "--from", partial, expected=4)
    assert f"the images lack {PAGES - FIRST} of the missing pages" in done.stderr
    info = imaged.info()
    assert (info["state"], info["pages_remaining"]) == ("running", PAGES - FIRST)
    report = resume(imaged, "--from", partial, "--poison", expected=5)
    assert report["pages_poisoned"] == PAGES - FIRST
    imaged.order(TOUCH_ALL, ROOT, CHILD)
    expected = Found(PAGES, 0, 0, FIRST, PAGES - FIRST, 0)
    assert [imaged.found(worker) for worker in (ROOT, CHILD)] == [expected] * 2


def without_shared(images: Path, copy: Path) -> None:
    folder = Folder(images)
    whole = from_images(folder.read())
    shared = [obj for obj in whole.memory if obj.kind is ObjectKind.SHARED]
    partial = replace(whole, memory={**whole.memory, **dict.fromkeys(shared, ())})
    with filled(Folder(copy), early=False) as draft, ImagePages(folder, memory_objects(whole)) as pages:
        draft.write(to_images(partial))
        write_pages(draft, partial, pages)
