"""An sshd at the destination and an ssh(1) at the source that know nothing but the keys made for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.hosts import Pair
from tests.live.programs import wait_until
from tests.needs import require

PORT = 2222
PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin"
SSHD = """
Port 2222
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PidFile none
SetEnv PATH={path} XDG_STATE_HOME={state}
"""
CLIENT = """
IdentityFile {folder}/{key}
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {folder}/known
GlobalKnownHostsFile none
StrictHostKeyChecking yes
ControlMaster auto
ControlPath {folder}/shared
{more}
"""


@dataclass(frozen=True, slots=True)
class Sshd:
    """`folder` has the client's configuration, keys and known hosts, which a test may change."""

    pair: Pair
    folder: Path
    server: subprocess.Popen[Any]

    @property
    def target(self) -> str:
        return f"ssh://root@{self.pair.destination.address}:{PORT}"

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}"}

    def configure(self, *, key: str = "user", more: str = "") -> None:
        """As ~/.ssh/config would be; a shared connection is wanted in it, and must not come to pass."""
        (self.folder / "ssh_config").write_text(CLIENT.format(folder=self.folder, key=key, more=more))

    def popen(self, words: Sequence[object], **options: Any) -> subprocess.Popen[str]:
        """A command at the source that finds this ssh."""
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        argv = [str(word) for word in words]
        return self.pair.source.popen(argv, env=self.environment(), text=True, **{**settings, **options})


@contextmanager
def serving(pair: Pair, *, path: str = PATH) -> Iterator[Sshd]:
    """`path` is the PATH of what is run there."""
    programs = {name: require(name) for name in ("ssh", "ssh-keygen", "sshd")}
    folder = pair.shared / "ssh"
    folder.mkdir()
    for name in ("host", "user", "other"):
        subprocess.run(
            [programs["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    public = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[{pair.destination.address}]:{PORT} {public}")
    state = pair.destination.scratch / "state"
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, path=path, state=state))
    client = folder / "ssh"
    client.write_text(f'#!/bin/sh\nexec {programs["ssh"]} -F {folder}/ssh_config "$@"\n')
    client.chmod(0o755)
    pair.destination.run(["mkdir", "-p", "/run/sshd"], check=True)
    log = folder / "log"
    with log.open("w") as file:
        argv = [str(programs["sshd"]), "-D", "-e", "-f", str(folder / "sshd_config")]
        server = pair.destination.popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        wait_until(lambda: server.poll() is not None or "listening on" in log.read_text(), "sshd listens")
        assert server.poll() is None, log.read_text()
        sshd = Sshd(pair, folder, server)
        sshd.configure()
        yield sshd
    finally:
        server.kill()
        server.wait()
