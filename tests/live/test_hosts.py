"""Two hosts on one machine: what is theirs alone, what they share, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.errors import HostLacks, NoSuchProcess
from lazyproc.hosts import PRIVATE, Host, Pair, Trio, ground, pair_of_hosts
from tests.live.programs import wait_until

_SAY_CLOCKS = "import time; print(time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))"


def _output(host: Host, *argv: str) -> str:
    return str(host.run(argv, check=True, capture_output=True, text=True).stdout)


def test_private_directories_start_empty_and_stay_apart(pair: Pair) -> None:
    for place in PRIVATE:
        pair.source.run(["touch", f"{place}/only-here"], check=True)
        assert "only-here" in _output(pair.source, "ls", place)
        assert "only-here" not in _output(pair.destination, "ls", place)
        assert not Path(place, "only-here").exists()


def test_scratch_is_each_hosts_own_and_shared_is_common(pair: Pair) -> None:
    (pair.source.outside / "cargo").write_text("mine")
    (pair.shared / "status").write_text("everybody's")
    assert (
        _output(pair.source, "cat", f"{pair.source.scratch}/cargo", f"{pair.shared}/status")
        == "mineeverybody's"
    )
    assert _output(pair.destination, "ls", str(pair.destination.scratch)) == ""
    assert _output(pair.destination, "cat", f"{pair.shared}/status") == "everybody's"


def test_clocks_are_a_day_apart(pair: Pair) -> None:
    here = [int(word) for word in _output(pair.source, sys.executable, "-c", _SAY_CLOCKS).split()]
    there = [int(word) for word in _output(pair.destination, sys.executable, "-c", _SAY_CLOCKS).split()]
    for one, other in zip(here, there, strict=True):
        assert 86_400 <= (other - one) / 1e9 < 86_500


def test_sysv_keys_and_hostnames_are_their_own(pair: Pair) -> None:
    _output(pair.source, "ipcmk", "--shmem", "4096")
    assert len(_output(pair.source, "ipcs", "-m").splitlines()) > len(
        _output(pair.destination, "ipcs", "-m").splitlines()
    )
    assert _output(pair.source, "cat", "/proc/sys/kernel/hostname") == "source\n"


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


@contextlib.contextmanager
def _answering(host: Host, address: str) -> Iterator[None]:
    """Somebody in the host who takes one connection, and has taken it in the end."""
    listen = f"import socket; s = socket.create_server(('{address}', 7)); print(1, flush=True); s.accept()"
    with host.popen([sys.executable, "-c", listen], stdout=subprocess.PIPE) as server:
        assert _first_line(server) == b"1\n"
        yield
        assert server.wait(5) == 0


def _call(host: Host, address: str) -> None:
    call = f"import socket; socket.create_connection(('{address}', 7), 5)"
    host.run([sys.executable, "-c", call], check=True)


def test_they_reach_each_other_and_the_link_is_limited() -> None:
    with pair_of_hosts(rate="800mbit") as pair:
        with _answering(pair.destination, str(pair.destination.address)):
            _call(pair.source, str(pair.destination.address))
        assert "rate 800Mbit" in _output(pair.source, "tc", "qdisc", "show", "dev", "eth0")


def test_an_address_can_move_between_two_ports(trio: Trio) -> None:
    for host, former in ((trio.source, None), (trio.destination, trio.source)):
        if former is not None:
            former.run(["ip", "address", "del", "10.77.0.9/24", "dev", "eth0"], check=True)
            trio.client.run(["ip", "neighbour", "flush", "dev", "eth0"], check=True)
        host.run(["ip", "address", "add", "10.77.0.9/24", "dev", "eth0"], check=True)
        with _answering(host, "10.77.0.9"):
            _call(trio.client, "10.77.0.9")


def test_processes_are_ours_with_pids_of_their_own(host: Host) -> None:
    talk = ["sh", "-c", "echo $$; exec cat"]
    with host.popen(talk, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        vpid = int(_first_line(process))
        assert host.vpid(process.pid) == vpid != process.pid
        assert host.pid(vpid) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
    with pytest.raises(NoSuchProcess):
        host.pid(vpid)


def test_a_nested_pid_namespace_belongs_to_the_host(host: Host) -> None:
    nest = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "echo $$; exec cat"]
    with host.popen(nest, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert _first_line(process) == b"1\n"
        (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        assert host.pid(host.vpid(child)) == child


def test_the_init_reaps_orphans(host: Host) -> None:
    host.run(["sh", "-c", "sh -c 'exit 3' & sleep 0.01 & exec true"], check=True)
    wait_until(
        lambda: len(_output(host, "ps", "-eo", "pid=").splitlines()) <= 2, "only the init and ps are left"
    )


def test_the_current_directory_and_the_environment_come_along(host: Host) -> None:
    assert _output(host, "pwd").strip() == str(Path.cwd())
    told = host.run(
        ["sh", "-c", "pwd; echo $WORD"], cwd="/usr", env={"WORD": "x"}, capture_output=True, text=True
    )
    assert told.stdout == "/usr\nx\n"


def test_everything_goes_when_the_owner_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert owner.stdout is not None
    pid, place = owner.stdout.readline().split()
    assert Path(place).exists()
    owner.kill()
    owner.wait()
    owner.stdout.close()

    def swept() -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), os.WNOHANG)  # the orphan is ours now, and its namespace waits for its burial
        return not Path(place).exists()

    wait_until(swept, "the ground is swept")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


_OWNER = """
import signal, sys
from lazyproc.hosts import pair_of_hosts
with pair_of_hosts() as pair:
    print(pair.source.popen(["sleep", "1000"]).pid, pair.shared, flush=True)
    signal.pause()
"""


def test_a_lack_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with ground() as floor, monkeypatch.context() as without_tools:
        without_tools.setenv("PATH", "/nowhere")
        with pytest.raises(HostLacks, match="apt install"), Host("alone", floor, 1):
            pass


def test_it_is_quick_enough_to_be_made_for_each_test() -> None:
    started = time.monotonic()
    with pair_of_hosts():
        assert time.monotonic() - started < 5
