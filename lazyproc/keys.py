"""A small CA and a pair of keys for each of two hosts, made with openssl(1)."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from ipaddress import ip_address
from pathlib import Path

from lazyproc.errors import HostLacks, LazyprocError, UsageError
from lazyproc.facts import dataclass
from lazyproc.private import make_folder

DAYS = 730
CA = "ca"
_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*", re.ASCII)

# Everything is said here, so that the host's own openssl.cnf changes nothing.
_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {name}
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[host]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {alternative}
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """The certificate and the private key of one host; `ca` is what the other one's must be signed by."""

    host: str
    cert: Path
    key: Path
    ca: Path


def make_keys(directory: Path, hosts: tuple[str, ...], *, days: int = DAYS) -> tuple[Pair, ...]:
    """A new CA in `directory` (made with mode 0700), and for each host a certificate for its name or address.

    Files have mode 0600. Each host needs its own pair and ca.pem; ca.key, which can make more, none. Raises UsageError
    for names and for a folder with something in it, HostLacks without openssl, LazyprocError.
    """
    _demand_names(hosts)
    _make_folder(directory)
    ca, ca_key = directory / f"{CA}.pem", directory / f"{CA}.key"
    subject = f"lazyproc {secrets.token_hex(4)}"  # two CAs of the same name would be taken for one another
    _openssl(
        directory,
        _CONFIG.format(name=subject, alternative="DNS:none"),
        *("req", "-x509", "-extensions", "ca", *_NEW_KEY, ca_key, "-out", ca, "-days", days),
    )
    return tuple(_pair(directory, host, days) for host in hosts)


_NEW_KEY = ("-sha256", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout")


def _pair(directory: Path, host: str, days: int) -> Pair:
    stem = host.replace(":", "-")  # scp(1) takes what is before a colon for a host
    pair = Pair(host, directory / f"{stem}.pem", directory / f"{stem}.key", directory / f"{CA}.pem")
    config = _CONFIG.format(name=host[:64], alternative=f"{'IP' if _is_address(host) else 'DNS'}:{host}")
    request = directory / f"{stem}.csr"
    _openssl(directory, config, "req", "-new", *_NEW_KEY, pair.key, "-out", request)
    _openssl(
        directory,
        config,
        *("x509", "-req", "-in", request, "-out", pair.cert, "-days", days, "-sha256"),
        *("-CA", pair.ca, "-CAkey", directory / f"{CA}.key", "-set_serial", str(secrets.randbits(120))),
        *("-extensions", "host"),
    )
    request.unlink()
    return pair


def _openssl(directory: Path, config: str, command: str, *options: object) -> None:
    """One command of openssl(1) with that configuration. Raises HostLacks, LazyprocError with what it said."""
    path = directory / "openssl.cnf"
    path.write_text(config)
    place = "-extfile" if command == "x509" else "-config"
    argv = ["openssl", command, *map(str, options), place, str(path)]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, umask=0o077, check=False
        )
    except FileNotFoundError:
        raise HostLacks(
            "is needed to make keys",
            where="openssl",
            remedy="install the package openssl, or make them elsewhere",
        ) from None
    finally:
        path.unlink()
    if done.returncode:
        raise LazyprocError(f"failed: {done.stderr.strip()[-400:]}", where=f"openssl {command}")


def _make_folder(directory: Path) -> None:
    try:
        make_folder(directory)
        if any(directory.iterdir()):
            raise UsageError(
                "is not empty", where=str(directory), remedy="name a new folder: nothing is overwritten"
            )
        os.chmod(directory, 0o700)
    except OSError as error:
        raise UsageError(f"cannot be used: {error.strerror}", where=str(directory)) from None


def _demand_names(hosts: tuple[str, ...]) -> None:
    for host in hosts:
        if not _is_address(host) and not _NAME.fullmatch(host):
            raise UsageError(
                "is no host name and no address", where=repr(host), remedy="give it without a port"
            )
    if len({host.lower() for host in hosts}) != len(hosts) or CA in hosts:
        raise UsageError("the hosts need names of their own, other than ca", where=" ".join(hosts))


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
