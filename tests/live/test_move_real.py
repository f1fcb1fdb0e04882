"""Seven real programs, each moved while it is in use, its memory following; and interrupts at awkward moments.

Promised for every move: each page is counted once, nothing of the tree is left behind, nothing of lazyproc stays in
it, and it does not need `lazyproc receive` once its pages are there.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lazyproc.hosts import Host, Pair, Trio
from lazyproc.kernel.sockopt import SO_RCVBUFFORCE
from lazyproc.migrate.address import announce
from tests.live.lockers import is_free
from tests.live.moving import receiving
from tests.live.programs import SOURCES, running, wait_until
from tests.live.real import (
    check_clean,
    dialled,
    ending,
    migrating,
    move_now,
    network_of,
    runs,
)
from tests.live.real_redis import PORT, Connection, asking, loaded, redis_server
from tests.needs import lacking, require

KEYS = 200_000
SERVICE = "10.77.0.77"  # an address that moves with the process
HTTP = 8080
ETH_P_ALL = 3


@contextmanager
def service(host: Host, argv: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process on a host, its output in the host's directory; killed with its group at the end."""
    with (host.outside / "service.log").open("w") as log:
        process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def give(host: Host, verb: str) -> None:
    """Add or delete the address that moves."""
    host.run(["ip", "address", verb, f"{SERVICE}/24", "dev", "eth0"], check=True)


def test_redis_and_a_connection_that_is_never_idle(trio: Trio) -> None:
    """The address moves along: the client keeps its connection, and every write is done exactly once."""
    with ExitStack() as stack:
        give(trio.source, "add")
        redis, digest = stack.enter_context(redis_server(trio.source, KEYS))
        connection = Connection(dialled(trio.client, SERVICE, PORT))
        stack.callback(connection.close)
        with receiving(trio.destination) as receiver:
            with loaded(connection) as load:
                wait_until(lambda: load.acknowledged > 20, "the client works")
                give(trio.destination, "add")
                with migrating(trio.source, receiver, redis.pid, "--max-rate", "30000000") as journey:
                    journey.wait_running()
                    give(trio.source, "del")
                    with network_of(trio.destination):
                        announce("eth0", socket.inet_aton(SERVICE))
                    at_handover = load.acknowledged
                    wait_until(lambda: load.acknowledged > at_handover + 20, "the client goes on")
                    assert journey.still_lazy()
                    new, report = journey.arrive()
                stack.enter_context(ending(new))
                at_end = load.acknowledged
                wait_until(lambda: load.acknowledged > at_end + 20, "the client goes on")
            assert report["pages_urgent"] > 0
        load.check_all()
        assert connection.call("DBSIZE") == KEYS
        assert connection.call("DEBUG", "DIGEST") == digest


@contextmanager
def sent_by(host: Host) -> Iterator[socket.socket]:
    """All Ethernet frames at a host's interface."""
    with network_of(host):
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sniffer.bind(("eth0", ETH_P_ALL))
    with sniffer:
        sniffer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 28)
        sniffer.settimeout(10)
        yield sniffer


def test_an_idle_client_hears_where_the_address_is_before_its_connection_speaks(trio: Trio) -> None:
    """The destination knows the client's Ethernet address, so it asks nobody for it: nothing else would tell."""
    service = socket.inet_aton(SERVICE)
    with ExitStack() as stack:
        give(trio.source, "add")
        redis, _ = stack.enter_context(redis_server(trio.source, 10))
        connection = Connection(dialled(trio.client, SERVICE, PORT))
        stack.callback(connection.close)
        assert connection.call("PING") == "PONG"
        give(trio.destination, "add")
        client = connection.sock.getsockname()[0]
        link = trio.client.run(
            ["ip", "-o", "link", "show", "eth0"], capture_output=True, text=True, check=True
        )
        mac = re.findall(r"link/ether (\S+)", link.stdout)[0]
        known = ["ip", "neighbour", "replace", client, "lladdr", mac, "dev", "eth0", "nud", "permanent"]
        trio.destination.run(known, check=True)
        sniffer = stack.enter_context(sent_by(trio.destination))
        with receiving(trio.destination) as receiver:
            new, _ = move_now(trio.source, receiver, redis.pid)
            stack.enter_context(ending(new))
        assert [frame[12:14] for frame in _frames_of(sniffer, service, 2)] == [b"\x08\x06", b"\x08\x00"]
        assert connection.call("PING") == "PONG"


def _frames_of(sniffer: socket.socket, address: bytes, count: int) -> list[bytes]:
    """The first frames that the host itself sent from this address."""
    found: list[bytes] = []
    while len(found) < count:
        frame, (_, _, direction, *_) = sniffer.recvfrom(1 << 16)
        sender = frame[28:32] if frame[12:14] == b"\x08\x06" else frame[26:30]
        if direction == socket.PACKET_OUTGOING and sender == address:
            found.append(frame)
    return found


def test_a_connection_whose_address_stays_is_refused_and_lives_on(pair: Pair) -> None:
    """Without the address the connection cannot be held: said before anything is lost, and nobody notices."""
    with redis_server(pair.source, 10) as (redis, _), receiving(pair.destination) as receiver:
        address = str(pair.source.address)
        connection = Connection(dialled(pair.destination, address, PORT))
        with loaded(connection) as load:
            wait_until(lambda: load.acknowledged > 20, "the client works")
            with migrating(pair.source, receiver, redis.pid) as journey:
                journey.finish(expected=3)
            assert f"TCP {address}: " in journey.log()
            assert "frozen" not in journey.log().split()
            assert f"ip address add {address} dev INTERFACE" in journey.log()
            at_end = load.acknowledged
            wait_until(lambda: load.acknowledged > at_end + 20, "the client goes on")
        load.check_all()
        connection.close()


NGINX = """
daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/error.log; user root;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen {port} reuseport; root {folder}/www; }}
}}
"""


def nginx_files(folder: Path) -> dict[str, str]:
    """Files to serve, from a byte to some MiB: name and hash."""
    hashes = {}
    (folder / "www").mkdir()
    for size in (1, 5000, 300_000, 3_000_000):
        content = os.urandom(size)
        (folder / "www" / str(size)).write_bytes(content)
        hashes[str(size)] = hashlib.sha256(content).hexdigest()
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=HTTP))
    return hashes


@contextmanager
def browser(host: Host, address: str) -> Iterator[http.client.HTTPConnection]:
    """A keep-alive connection from a host."""
    client = http.client.HTTPConnection(address, HTTP)
    client.sock = dialled(host, address, HTTP)
    try:
        yield client
    finally:
        client.close()


def fetch_all(client: http.client.HTTPConnection, hashes: dict[str, str]) -> None:
    used = client.sock
    for name, expected in hashes.items():
        client.request("GET", f"/{name}")
        answer = client.getresponse()
        assert answer.status == 200
        assert hashlib.sha256(answer.read()).hexdigest() == expected, name
    assert client.sock is used, "the connection was not kept"


def test_nginx_with_two_workers(pair: Pair) -> None:
    """The same files from the new address, over one connection that lives from the first moment on."""
    program = require("nginx")
    with ExitStack() as stack:
        hashes = nginx_files(pair.shared)
        command = [str(program), "-c", str(pair.shared / "nginx.conf"), "-p", str(pair.shared)]
        nginx = stack.enter_context(service(pair.source, command))
        with browser(pair.destination, str(pair.source.address)) as client:
            fetch_all(client, hashes)
        with receiving(pair.destination) as receiver:
            with migrating(pair.source, receiver, nginx.pid, "--max-rate", "1500000") as journey:
                journey.wait_running()
                client = stack.enter_context(browser(pair.source, str(pair.destination.address)))
                fetch_all(client, hashes)
                assert journey.still_lazy()
                new, _ = journey.arrive()
            stack.enter_context(ending(new))
            fetch_all(client, hashes)
        fetch_all(client, hashes)


POSTGRES = """
set -e
bin=$1 folder=$2
$bin/postgres -D $folder/data -k /tmp -c listen_addresses= -c fsync=off & server=$!
until $bin/pg_isready -q -h /tmp; do :; done
$bin/pgbench -q -i -h /tmp postgres
while [ ! -e $folder/stop ]; do $bin/pgbench -n -c 4 -j 2 -t 1000 -h /tmp postgres >> $folder/results; done
$bin/psql -h /tmp -At postgres -c "select (select sum(abalance) from pgbench_accounts),
  (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers),
  (select sum(delta) from pgbench_history), (select count(*) from pgbench_history)" > $folder/totals
kill -INT $server
wait $server
touch $folder/done
"""


def as_postgres(*argv: str | Path) -> list[str | Path]:
    return ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups", *argv]


def test_postgres_and_pgbench_in_one_tree(pair: Pair) -> None:
    """Both ends of every connection move: no transaction fails and the books balance."""
    binaries = require("postgres").resolve().parent
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        lacking("there is no user postgres", "apt install postgresql")
    folder = pair.shared / "postgres"
    folder.mkdir()
    os.chown(folder, user.pw_uid, user.pw_gid)
    initdb = as_postgres(binaries / "initdb", "-N", "-D", folder / "data")
    pair.source.run(initdb, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    argv = as_postgres("sh", "-c", POSTGRES, "sh", binaries, folder)
    results = folder / "results"
    with ExitStack() as stack:
        tree = stack.enter_context(service(pair.source, argv, cwd="/"))
        wait_until(results.exists, "pgbench works", 30)
        with receiving(pair.destination) as receiver:
            new, _ = move_now(pair.source, receiver, tree.pid)
            stack.enter_context(ending(new))
            _grows(results)
        (folder / "stop").touch()
        wait_until(lambda: not runs(new), "the last result, and the end of the server")
    assert (folder / "done").exists(), (pair.source.outside / "service.log").read_text()
    accounts, branches, tellers, history, count = map(int, (folder / "totals").read_text().split("|"))
    assert accounts == branches == tellers == history
    words = results.read_text()
    runs_of_pgbench = re.findall(r"actually processed: (\d+)/(\d+)\n.*failed transactions: 0 ", words)
    assert len(runs_of_pgbench) == words.count("scaling factor")
    assert [done for done, _ in runs_of_pgbench] == [wanted for _, wanted in runs_of_pgbench]
    assert sum(int(done) for done, _ in runs_of_pgbench) == count


MARIADB = """
set -e
folder=$1
mariadb-install-db --no-defaults --user=root --datadir=$folder/data --auth-root-authentication-method=normal
mariadbd --no-defaults --user=root --datadir=$folder/data --socket=/tmp/socket --pid-file=/tmp/pid --skip-networking \\
  --innodb-use-native-aio=0 & server=$!
ask="mariadb --no-defaults --socket=/tmp/socket --skip-column-names --unbuffered"
until $ask -e "create database books" 2>/dev/null; do kill -0 $server; done
$ask books -e "create table t (number int auto_increment primary key, amount int) engine=innodb"
while [ ! -e $folder/stop ]; do
  echo "begin; insert t (amount) values (1); insert t (amount) values (-1); commit; select count(*) from t;"
done | $ask books >> $folder/results
$ask books -e "select count(*), sum(amount) from t; check table t" > $folder/totals
kill $server
wait $server
touch $folder/done
"""


def test_mariadb_with_its_files_locked(pair: Pair) -> None:
    """As it is on storage that both hosts have; no second server can have them, and the books balance."""
    require("mariadbd")
    folder = pair.shared / "mariadb"
    folder.mkdir()
    results, tables = folder / "results", folder / "data/ibdata1"
    with ExitStack() as stack:
        tree = stack.enter_context(service(pair.source, ["sh", "-c", MARIADB, "sh", folder], cwd="/"))
        wait_until(lambda: results.exists() and results.stat().st_size > 100, "its client works", 60)
        assert not is_free(tables)
        with receiving(pair.destination) as receiver:
            new, report = move_now(pair.source, receiver, tree.pid)
            stack.enter_context(ending(new))
            assert "locks" in report["steps_there_ms"]
            _grows(results)
            assert not is_free(tables)
        (folder / "stop").touch()
        wait_until(lambda: not runs(new), "the last result, and the end of the server")
    assert (folder / "done").exists(), (pair.source.outside / "service.log").read_text()
    count, total, *checked = (folder / "totals").read_text().split()
    assert (count, total, checked[-1]) == (results.read_text().split()[-1], "0", "OK")
    assert is_free(tables)


def test_eight_threads_over_numpy_arrays(pair: Pair) -> None:
    """Sums and matrix products stay right, and the heartbeat goes on in its file."""
    if find_spec("numpy") is None:
        lacking("the Python package numpy is missing", "pip install numpy")
    heartbeat = pair.shared / "heartbeat"
    heartbeat.touch()
    argv = [sys.executable, str(SOURCES / "numpy_threads.py"), str(heartbeat)]
    with ExitStack() as stack:
        cargo = stack.enter_context(service(pair.source, argv))
        lines = _lines(heartbeat)
        wait_until(lambda: len(lines()) > 5, "all threads work")
        with receiving(pair.destination) as receiver:
            with migrating(pair.source, receiver, cargo.pid, "--max-rate", "30000000") as journey:
                journey.wait_running()
                at_handover = len(lines())
                wait_until(lambda: len(lines()) > at_handover + 2, "all threads go on")
                assert journey.still_lazy()
                new, report = journey.arrive()
            stack.enter_context(ending(new))
        at_end = len(lines())
        wait_until(lambda: len(lines()) > at_end + 5, "all threads go on")
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not runs(new), "the last round")
        *beats, verdict = lines()
        assert verdict == "ok"
        assert beats == sorted(set(beats), key=int)
        assert report["pages_urgent"] > 0


def _lines(path: Path) -> Any:
    return lambda: path.read_text().splitlines()


PIPELINE = r"""
(i=0; while [ ! -e stop ]; do echo $i; i=$((i + 1)); done) | sed -u 's/.*/<&>/' | cat > output
touch complete
"""


def test_a_pipeline_of_three_processes(pair: Pair) -> None:
    """Everything the producer says arrives, in order, nothing twice."""
    folder = pair.shared
    output = folder / "output"
    with ExitStack() as stack:
        shell = stack.enter_context(service(pair.source, ["sh", "-c", PIPELINE], cwd=folder))
        wait_until(lambda: output.exists() and output.stat().st_size > 10_000, "it flows")
        with receiving(pair.destination) as receiver:
            new, _ = move_now(pair.source, receiver, shell.pid)
            stack.enter_context(ending(new))
        size = output.stat().st_size
        wait_until(lambda: output.stat().st_size > size + 10_000, "it flows on")
        (folder / "stop").touch()
        wait_until((folder / "complete").exists, "the end of the pipeline")
        wait_until(lambda: not runs(new), "the shell ends")
    lines = output.read_text().splitlines()
    assert lines == [f"<{number}>" for number in range(len(lines))]


def test_fork_mremap_and_munmap_while_the_pages_are_missing(pair: Pair) -> None:
    mib = 64
    with ExitStack() as stack:
        program = stack.enter_context(
            running("fork_lazy", mib, directory=pair.shared, host=pair.source, exclusive=True)
        )
        program.watch.wait_beats()
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, program.pid, "--max-rate", "4000000") as journey,
        ):
            journey.wait_running()
            program.watch.wait_beats(rounds=1)
            assert journey.still_lazy()
            new, report = journey.arrive()
        stack.enter_context(ending(new))
        assert report["pages_urgent"] > 0
        # Without an observer at the freeze one is forked right after it, and wants all that its parent drops.
        with_observer = report["pages_total"] > mib << 8
        assert report["pages_dropped"] > 0 or not with_observer
        program.watch.wait_beats()
        check_clean(new)
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


FORKING = """
i=0
while :; do
  i=$((i + 1)); /bin/echo $i >> count
  /bin/true | /bin/true & (exec 7< /dev/null; /bin/true); wait
done
"""


def _grows(path: Path) -> None:
    size = path.stat().st_size
    wait_until(lambda: path.stat().st_size > size, f"{path.name} grows")


def test_a_shell_that_never_stops_forking(pair: Pair) -> None:
    """Wherever it is caught, between fork, exec and wait: each command is run once, in order."""
    count = pair.shared / "count"
    with (
        service(pair.source, ["sh", "-c", FORKING], cwd=pair.shared) as shell,
        receiving(pair.destination) as there,
        receiving(pair.source) as back,
        ExitStack() as stack,
    ):
        wait_until(count.exists, "it counts")
        pid = shell.pid
        for source, receiver in ((pair.source, there), (pair.destination, back)) * 2:
            pid, _ = move_now(source, receiver, pid)
            stack.enter_context(ending(pid))
            _grows(count)
        os.kill(pid, signal.SIGKILL)
    lines = count.read_text().splitlines()
    assert lines == [str(number + 1) for number in range(len(lines))]


@pytest.mark.long
def test_redis_there_and_back_five_times(pair: Pair) -> None:
    with (
        redis_server(pair.source, KEYS) as (redis, digest),
        receiving(pair.destination) as there,
        receiving(pair.source) as back,
        ExitStack() as stack,
    ):
        pid = redis.pid
        for _ in range(5):
            for source, receiver in ((pair.source, there), (pair.destination, back)):
                pid, _ = move_now(source, receiver, pid)
                stack.enter_context(ending(pid))
                with asking(receiver.host) as connection:
                    assert connection.call("DEBUG", "DIGEST") == digest
                    assert connection.call("DBSIZE") == KEYS
