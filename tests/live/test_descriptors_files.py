"""Files, directories and devices: from a stopped process into ours."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.errors import RestoreError
from lazyproc.model import RegularFile
from lazyproc.restore.files import make_files
from tests.live.descriptors import at, checkpoint_of, gathered_from, made, made_from, obstacle_words

TMPFS = Path("/dev/shm")


@pytest.fixture
def shm() -> Iterator[Path]:
    """A name on a tmpfs; what the test leaves there is removed."""
    path = TMPFS / f"lazyproc-{os.getpid()}"
    yield path
    if path.exists():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def test_position_flags_and_sharing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    def body() -> None:
        at(10, os.open(path, os.O_RDWR))
        os.lseek(10, 4, os.SEEK_SET)
        os.dup2(10, 11)
        at(12, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))

    with made_from(body) as fds:
        assert os.read(fds[10], 2) == b"45"
        assert fds[10] == fds[11]  # one open file description, so one position
        assert fds[12] != fds[10]
        assert _flags(fds[12]) & os.O_APPEND
        assert _flags(fds[12]) & os.O_NONBLOCK
        assert _flags(fds[12]) & os.O_ACCMODE == os.O_WRONLY
        os.write(fds[12], b"X")
    assert path.read_bytes() == b"0123456789X"


def test_a_child_shares_what_its_parent_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")

    def child() -> None:
        os.lseek(10, 2, os.SEEK_SET)
        at(11, os.open(path, os.O_RDONLY))  # the same file, another description

    with gathered_from(lambda: at(10, os.open(path, os.O_RDONLY)), child) as gathered:
        parent, other = gathered.descriptors.values()
        numbers = [{row.fd: row.file_id for row in rows} for rows in (parent, other)]
        assert numbers[0][10] == numbers[1][10] != numbers[1][11]
        assert gathered.files[numbers[0][10]].pos == 2
        assert 11 not in numbers[0]


def test_close_on_exec_belongs_to_the_descriptor(tmp_path: Path) -> None:
    def body() -> None:
        at(10, os.open(tmp_path, os.O_RDONLY))
        os.dup2(10, 11, inheritable=False)

    with gathered_from(body) as gathered:
        (rows,) = gathered.descriptors.values()
        assert {row.fd: row.cloexec for row in rows if row.fd in (10, 11)} == {10: False, 11: True}
        assert len({row.file_id for row in rows if row.fd in (10, 11)}) == 1
        assert all(not file.flags & os.O_CLOEXEC for file in gathered.files.values())


def test_many_descriptors_of_many_descriptions(tmp_path: Path) -> None:
    """Descriptions are found by binary search: each of 300 is told from the others, and has its dup."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))

    def body() -> None:
        for number in range(100, 400):
            at(number, os.open(path, os.O_RDONLY))
            os.lseek(number, number, os.SEEK_SET)
        for number in range(100, 400):
            os.dup2(number, 2000 - number)

    with gathered_from(body) as gathered:
        (rows,) = gathered.descriptors.values()
        files = {row.fd: row.file_id for row in rows}
        assert len({files[number] for number in range(100, 400)}) == 300
        for number in range(100, 400):
            assert files[number] == files[2000 - number]
            assert gathered.files[files[number]].pos == number


def test_directory_and_its_position(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).touch()

    def body() -> None:
        at(10, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))

    with made_from(body) as fds:
        assert stat.S_ISDIR(os.fstat(fds[10]).st_mode)
        assert sorted(os.listdir(fds[10])) == list("abcdef")


def test_devices_that_every_host_has() -> None:
    def body() -> None:
        at(10, os.open("/dev/zero", os.O_RDONLY))
        at(11, os.open("/dev/urandom", os.O_RDONLY))

    with made_from(body) as fds:
        assert os.read(fds[10], 4) == bytes(4)
        assert len(os.read(fds[11], 8)) == 8
        assert os.read(fds[0], 1) == b""


def test_path_only_descriptors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")

    def body() -> None:
        at(10, os.open(tmp_path / "file", os.O_PATH))
        at(11, os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW))
        at(12, os.open(tmp_path / "fifo", os.O_PATH))

    with made_from(body) as fds:
        assert all(_flags(fds[number]) & os.O_PATH for number in (10, 11, 12))
        for number, name in ((10, "file"), (11, "link"), (12, "fifo")):
            assert os.fstat(fds[number]).st_ino == (tmp_path / name).lstat().st_ino


def test_deleted_file_keeps_name_content_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "gone"

    def body() -> None:
        at(10, os.open(path, os.O_RDWR | os.O_CREAT, 0o640))
        os.pwrite(10, b"start", 0)
        os.pwrite(10, b"end", 1 << 30)
        os.lseek(10, 5, os.SEEK_SET)
        at(11, os.open(path, os.O_RDONLY))
        os.unlink(path)

    with made_from(body) as fds:
        assert os.readlink(f"/proc/self/fd/{fds[10]}") == f"{path} (deleted)"
        status = os.fstat(fds[10])
        assert (status.st_size, status.st_nlink, stat.S_IMODE(status.st_mode)) == ((1 << 30) + 3, 0, 0o640)
        assert status.st_blocks < 64  # the hole is still one
        assert os.pread(fds[10], 5, 0) == b"start"
        assert os.pread(fds[10], 9, 1 << 30) == b"end"
        os.write(fds[10], b"!")
        assert os.pread(fds[11], 6, 0) == b"start!"  # the same file, another description
    assert not path.exists()


def test_what_was_removed_and_is_no_regular_file(tmp_path: Path) -> None:
    names = {10: "directory", 11: "link", 12: "device"}

    def body() -> None:
        os.mkdir(tmp_path / "directory", 0o750)
        at(10, os.open(tmp_path / "directory", os.O_RDONLY | os.O_DIRECTORY))
        os.rmdir(tmp_path / "directory")
        os.symlink("nowhere", tmp_path / "link")
        at(11, os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW))
        os.unlink(tmp_path / "link")
        os.mknod(tmp_path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        at(12, os.open(tmp_path / "device", os.O_RDWR))
        os.unlink(tmp_path / "device")

    with made_from(body) as fds:
        for number, name in names.items():
            assert os.readlink(f"/proc/self/fd/{fds[number]}") == f"{tmp_path / name} (deleted)"
            assert os.fstat(fds[number]).st_nlink == 0
        assert os.listdir(fds[10]) == []
        assert os.readlink("", dir_fd=fds[11]) == "nowhere"
        assert os.fstat(fds[12]).st_rdev == os.makedev(1, 3)
        assert os.write(fds[12], b"into the void") == 13
    assert os.listdir(tmp_path) == []


def test_deleted_file_whose_name_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def body() -> None:
        at(10, os.open(path, os.O_RDWR | os.O_CREAT))
        os.write(10, b"old")
        os.unlink(path)
        path.write_bytes(b"new")

    with made_from(body) as fds:
        assert os.pread(fds[10], 9, 0) == b"old"
        assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["log"]


def test_file_without_a_name(tmp_path: Path) -> None:
    def body() -> None:
        at(10, os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
        os.write(10, b"anonymous")

    with made_from(body) as fds:
        assert os.pread(fds[10], 99, 0) == b"anonymous"
        assert os.fstat(fds[10]).st_nlink == 0
        assert os.listdir(tmp_path) == []
        # With a directory's descriptor it is linkat(2), which follows the link.
        os.link(f"/proc/self/fd/{fds[10]}", tmp_path / "named", src_dir_fd=fds[10])
    assert (tmp_path / "named").read_bytes() == b"anonymous"


def test_other_hard_link_in_the_same_directory(tmp_path: Path) -> None:
    def body() -> None:
        at(10, os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT))
        os.link(tmp_path / "a", tmp_path / "b")
        os.unlink(tmp_path / "a")

    with made_from(body) as fds:
        assert os.readlink(f"/proc/self/fd/{fds[10]}") == str(tmp_path / "b")


def test_a_living_file_may_be_called_deleted(tmp_path: Path) -> None:
    path = tmp_path / "x (deleted)"

    with made_from(lambda: at(10, os.open(path, os.O_RDWR | os.O_CREAT))) as fds:
        assert os.readlink(f"/proc/self/fd/{fds[10]}") == str(path)


def test_tmpfs_file_travels_with_its_directories(shm: Path) -> None:
    def body() -> None:
        shm.mkdir(mode=0o750)
        at(10, os.open(shm / "data", os.O_RDWR | os.O_CREAT, 0o604))
        os.write(10, b"on tmpfs")

    with gathered_from(body) as gathered:
        _remove(shm)
        with made(checkpoint_of(gathered)) as fds:
            assert os.pread(fds[10], 99, 0) == b"on tmpfs"
            assert os.readlink(f"/proc/self/fd/{fds[10]}") == str(shm / "data")
        assert (shm / "data").read_bytes() == b"on tmpfs"
        assert stat.S_IMODE((shm / "data").stat().st_mode) == 0o604
        assert stat.S_IMODE(shm.stat().st_mode) == 0o750
        with made(checkpoint_of(gathered)) as fds:  # what is there already and identical is used
            assert os.pread(fds[10], 99, 0) == b"on tmpfs"


def test_what_lies_where_tmpfs_files_are_to_be_is_left_alone_and_named(shm: Path) -> None:
    """All of it at once, with who uses it, and the command that puts it out of the way."""
    paths = [shm / "first", shm / "its second"]

    def body() -> None:
        shm.mkdir(mode=0o750)
        for number, path in enumerate(paths, 10):
            at(number, os.open(path, os.O_RDWR | os.O_CREAT, 0o604))
            os.write(number, b"on tmpfs")

    with gathered_from(body) as gathered:
        for path in paths:
            path.write_bytes(b"of others")
        with pytest.raises(RestoreError) as refused:
            made(checkpoint_of(gathered)).__enter__()
        words = (
            f"file {paths[0]}, {paths[1]}: something else is there on this host, in use by nobody; move it"
        )
        assert str(refused.value).startswith(words)
        assert [path.read_bytes() for path in paths] == [b"of others"] * 2
        paths[0].write_bytes(b"on tmpfs")
        with paths[1].open("r+b") as file, mmap.mmap(file.fileno(), 0):
            file.close()
            with pytest.raises(RestoreError, match=f"there on this host, in use by pid {os.getpid()}; when"):
                made(checkpoint_of(gathered)).__enter__()
        with pytest.raises(RestoreError) as refused:
            made(checkpoint_of(gathered)).__enter__()
        command = refused.value.remedy.removeprefix("move it out of the way: ")
        subprocess.run(command, shell=True, check=True)
        with made(checkpoint_of(gathered)) as fds:
            assert os.pread(fds[11], 99, 0) == b"on tmpfs"


def test_failed_restore_takes_tmpfs_files_away_again(shm: Path) -> None:
    def body() -> None:
        shm.mkdir()
        at(10, os.open(shm / "data", os.O_RDWR | os.O_CREAT))

    with gathered_from(body) as gathered:
        _remove(shm)
        restore = made(checkpoint_of(gathered))
        restore.__enter__()
        assert (shm / "data").exists()
        error = RuntimeError("a later step failed")
        assert not restore.__exit__(RuntimeError, error, None)
        assert not shm.exists()


def _send(fd: int) -> None:
    """Leave `fd` in a message between descriptors 10 and 11, and nowhere else."""
    sender, receiver = socket.socketpair()
    socket.send_fds(sender, [b"take this"], [fd])
    os.close(fd)
    at(10, sender.detach())
    at(11, receiver.detach())


def test_file_that_only_a_waiting_message_has(tmp_path: Path) -> None:
    path = tmp_path / "gone"

    def body() -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.write(fd, b"on the way")
        os.unlink(path)
        _send(fd)

    with gathered_from(body) as gathered:
        assert gathered.obstacles == []
        (number,) = (n for n, f in gathered.files.items() if getattr(f.resource, "path", "") == str(path))
        with make_files(checkpoint_of(gathered), open_path=os.open) as done:
            assert os.pread(done.files[number], 99, 0) == b"on the way"
            assert os.lseek(done.files[number], 0, os.SEEK_CUR) == 10
    (words,) = obstacle_words(lambda: _send(os.pidfd_open(os.getpid())))
    assert words.startswith(
        "a descriptor in a message that waits in a socket: anon_inode:[pidfd] is a pidfd; "
    )


def test_nothing_of_ours_stays_open(tmp_path: Path) -> None:
    def body() -> None:
        at(10, os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT))
        os.unlink(tmp_path / "a")
        _send(os.memfd_create("sent"))
        os.pipe()

    with made_from(body):
        pass
    before = sorted(os.listdir("/proc/self/fd"))
    with made_from(body):
        pass
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with gathered_from(lambda: at(10, os.open(path, os.O_RDWR | os.O_CREAT))) as gathered:
        path.unlink()
        with pytest.raises(RestoreError, match=rf"{path}: is not on this host.*; copy {path}"):
            made(checkpoint_of(gathered)).__enter__()
        path.mkdir()
        with pytest.raises(RestoreError, match="is another kind of file"):
            made(checkpoint_of(gathered)).__enter__()


def test_paths_start_at_the_root_directory_of_the_tree(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"jailed")

    def body() -> None:
        os.chroot(tmp_path)
        at(10, os.open("/inner/file", os.O_RDONLY))

    with gathered_from(body) as gathered:
        (rows,) = gathered.descriptors.values()
        resource = gathered.files[next(row.file_id for row in rows if row.fd == 10)].resource
        assert isinstance(resource, RegularFile)
        assert resource.path == "/inner/file"
