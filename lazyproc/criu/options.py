"""Every option of CRIU's command line, and what becomes of it here: one row each.

The parser, the refusals, `--help` and the table in docs/criu.md are made of these rows, and nothing else knows the
names of options that are not honoured.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

from lazyproc.facts import dataclass

CHECK, DUMP, RESTORE = "check", "dump", "restore"
PAGE_SERVER, LAZY_PAGES = "page-server", "lazy-pages"
COMMANDS = (CHECK, DUMP, RESTORE, PAGE_SERVER, LAZY_PAGES)
WORKING = (DUMP, RESTORE, PAGE_SERVER, LAZY_PAGES)
# CRIU's commands that are not here, with the reason.
REFUSED_COMMANDS: Mapping[str, str] = {
    "pre-dump": "there is no dump in steps yet; dump once, or migrate lazily with `lazyproc migrate`",
    "dedup": "there are no parent images to take pages out of, since there is no pre-dump yet",
    "service": "there is no RPC service yet",
    "swrk": "there is no RPC service yet",
    "cpuinfo": "processors are compared by `lazyproc check --peer`",
    "exec": "CRIU itself has removed it",
    "show": "use `lazyproc show DIR`, or crit",
}


class Kind(enum.Enum):
    DOES = "done"
    ALWAYS = "always so"  # lazyproc does without being asked what the option asks for
    PERMITS = "permits"  # without it something is refused; with it too, where lazyproc cannot
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Option:
    """`words` end the sentence "--name: ..." for who reads the table, and for a refusal say why and the way out.

    `argument` is the name of its value, in brackets when it can be left out. With `values` any other is refused. What
    differs between commands has a row for each of them.
    """

    name: str
    kind: Kind
    commands: tuple[str, ...]  # where it has a meaning; elsewhere it is noted in the log and has none
    words: str
    argument: str = ""
    short: str = ""
    negatable: bool = False  # --no-NAME takes it back
    values: tuple[str, ...] = ()

    @property
    def takes(self) -> bool:
        return bool(self.argument)

    @property
    def optional(self) -> bool:
        return self.argument.startswith("[") and self.argument.endswith("]")


DOES, ALWAYS, PERMITS, REFUSED = Kind
_CR = (DUMP, RESTORE)
_REMOTE = (DUMP, PAGE_SERVER, LAZY_PAGES)
_NAMESPACES = "namespaces are not dumped: a tree is restored in those of the command"
_ITERATIVE = "there is no dump in steps yet; dump once"

OPTIONS = (
    # What is worked on, and where
    Option("tree", DOES, (DUMP,), "the root of the process tree", "PID", "t"),
    Option("images-dir", DOES, WORKING, "folder of the images; the current one otherwise", "DIR", "D"),
    Option(
        "work-dir",
        DOES,
        WORKING,
        "folder of log, pidfile and socket; that of the images otherwise",
        "DIR",
        "W",
    ),
    Option("log-file", DOES, WORKING, "file for the log, in the work folder; stderr otherwise", "FILE", "o"),
    Option("log-pid", REFUSED, WORKING, "there is one log; leave it out", negatable=True),
    Option(
        "verbosity",
        DOES,
        COMMANDS,
        "what is logged: 1 errors, 2 warnings, 3 what is done, 4 each step",
        "[NUM]",
        "v",
    ),
    Option(
        "pidfile",
        DOES,
        (RESTORE, PAGE_SERVER, LAZY_PAGES),
        "file for the pid of the root, or of the command",
        "FILE",
    ),
    Option(
        "status-fd",
        DOES,
        (DUMP, PAGE_SERVER, LAZY_PAGES),
        "a zero byte is written to it when the command is ready",
        "FD",
    ),
    Option("close", DOES, COMMANDS, "closes a descriptor first", "FD"),
    Option("timeout", DOES, (DUMP,), "seconds that stopping the tree may take; 10 otherwise", "NUM"),
    Option(
        "action-script",
        DOES,
        _CR,
        "run with CRTOOLS_SCRIPT_ACTION before and after the stages; may be given again",
        "FILE",
    ),
    Option("help", DOES, COMMANDS, "this table", short="h"),
    Option("version", DOES, COMMANDS, "the version of CRIU that is followed, and lazyproc's", short="V"),
    Option("config", DOES, COMMANDS, "a file with an option on each line", "FILE"),
    Option(
        "no-default-config", DOES, COMMANDS, "/etc/criu/default.conf and ~/.criu/default.conf are not read"
    ),
    Option("feature", DOES, (CHECK,), "whether this host and lazyproc have it; `list` shows all", "NAME"),
    Option("all", DOES, (CHECK,), "every feature that lazyproc knows"),
    Option("extra", DOES, (CHECK,), "the same", negatable=True),
    Option("experimental", DOES, (CHECK,), "the same", negatable=True),
    Option("ms", REFUSED, (CHECK,), "CRIU has removed it; leave it out"),
    Option(
        "exec-cmd",
        REFUSED,
        (RESTORE,),
        "there is no command to run in place of a restore; restore detached, and start it then",
    ),
    # How it ends
    Option("leave-running", DOES, (DUMP,), "the tree runs on", short="R"),
    Option("leave-stopped", DOES, _CR, "the tree is left stopped, as by SIGSTOP", short="s"),
    Option("restore-detached", DOES, (RESTORE,), "returns when the tree runs", short="d", negatable=True),
    Option("daemon", DOES, (RESTORE,), "the same", negatable=True),
    Option(
        "daemon",
        REFUSED,
        (PAGE_SERVER, LAZY_PAGES),
        "start it in the background, and see --status-fd",
        negatable=True,
    ),
    Option(
        "restore-sibling",
        DOES,
        (RESTORE,),
        "the root is a child of who calls; otherwise of its reaper. With --restore-detached",
        short="S",
        negatable=True,
    ),
    Option("display-stats", REFUSED, _CR, "see stats-dump with crit", negatable=True),
    Option("unprivileged", REFUSED, COMMANDS, "a dump and a restore need root", negatable=True),
    # Files
    Option(
        "link-remap",
        PERMITS,
        (DUMP,),
        "files whose name is gone and that have another: refused",
        negatable=True,
    ),
    Option(
        "ghost-limit",
        DOES,
        (DUMP,),
        "bytes of a deleted file that are dumped, K, M, G; 1M otherwise, 256M at most",
        "SIZE",
    ),
    Option(
        "ghost-fiemap", ALWAYS, (DUMP,), "holes are found with SEEK_DATA, which says the same", negatable=True
    ),
    Option(
        "file-locks",
        PERMITS,
        _CR,
        "file locks and leases: taken again",
        short="l",
        negatable=True,
    ),
    Option(
        "evasive-devices", ALWAYS, (DUMP,), "a device is opened by the path that leads to it", negatable=True
    ),
    Option(
        "force-irmap",
        PERMITS,
        (DUMP,),
        "inotify watches of files that cannot be found otherwise: refused",
        negatable=True,
    ),
    Option("irmap-scan-path", PERMITS, (DUMP,), "the same", "PATH"),
    Option(
        "file-validation",
        DOES,
        _CR,
        "how a mapped file is compared; by size and build id",
        "HOW",
        values=("buildid",),
    ),
    Option(
        "skip-file-rwx-check",
        REFUSED,
        (RESTORE,),
        "a file that is another one is not taken for the same",
        negatable=True,
    ),
    Option(
        "inherit-fd",
        DOES,
        (RESTORE,),
        "descriptor N takes the place of what the tree had: `pipe:[INODE]`, `socket:[INODE]`, a path without its first "
        "slash, or what --external has left outside",
        "fd[N]:KEY",
    ),
    Option(
        "external",
        PERMITS,
        _CR,
        "`file[MNT:INODE]`, `tty[RDEV:DEV]`, `unix[INODE]`: stay outside; others: refused where they occur",
        "RESOURCE",
    ),
    # Sockets
    Option(
        "tcp-established",
        PERMITS,
        _CR,
        "established TCP connections: moved, with their address",
        negatable=True,
    ),
    Option(
        "tcp-close", DOES, _CR, "they are closed instead; by a dump those with the outside", negatable=True
    ),
    Option(
        "skip-in-flight",
        REFUSED,
        (DUMP,),
        "a connection that was not accepted yet is not dropped",
        negatable=True,
    ),
    Option(
        "ext-unix-sk",
        PERMITS,
        (DUMP,),
        "datagram sockets connected to a name outside: connected to it again; those of INODES: as by --external",
        "[INODES]",
        "x",
    ),
    Option("ext-unix-sk", ALWAYS, (RESTORE,), "they are connected again", "[INODES]"),
    Option(
        "network-lock",
        DOES,
        _CR,
        "how packets of the tree are held back; a dump of a tree in a network namespace of its own: refused",
        "HOW",
        values=("nftables",),
    ),
    Option(
        "shell-job",
        PERMITS,
        _CR,
        "sessions led from outside: become that of the restorer; their terminals: refused",
        short="j",
        negatable=True,
    ),
    Option("veth-pair", REFUSED, (RESTORE,), _NAMESPACES, "IN=OUT"),
    # Namespaces, mounts, groups
    Option(
        "root", DOES, (RESTORE,), "the root directory of the tree; without it that of the command", "DIR", "r"
    ),
    Option(
        "root",
        ALWAYS,
        (DUMP,),
        "files are called as the tree calls them, from its root directory",
        "DIR",
    ),
    Option("join-ns", REFUSED, (RESTORE,), f"{_NAMESPACES}; start it in them with nsenter", "NS:FILE", "J"),
    Option("empty-ns", REFUSED, _CR, _NAMESPACES, "NS"),
    Option("ext-mount-map", REFUSED, _CR, _NAMESPACES, "KEY:PATH", "M"),
    Option("enable-external-sharing", REFUSED, _CR, _NAMESPACES),
    Option("enable-external-masters", REFUSED, _CR, _NAMESPACES),
    Option("enable-fs", REFUSED, _CR, _NAMESPACES, "FS,..."),
    Option("skip-mnt", REFUSED, _CR, _NAMESPACES, "PATH"),
    Option("mntns-compat-mode", REFUSED, (RESTORE,), _NAMESPACES, negatable=True),
    Option(
        "manage-cgroups",
        REFUSED,
        _CR,
        "a tree gets a v2 cgroup of its own; `lazyproc restore --cgroup` names another",
        "[MODE]",
        values=("ignore",),
    ),
    Option("cgroup-root", REFUSED, _CR, "see --manage-cgroups", "[CONTROLLER:]PATH"),
    Option("cgroup-props", REFUSED, _CR, "see --manage-cgroups", "TEXT"),
    Option("cgroup-props-file", REFUSED, _CR, "see --manage-cgroups", "FILE"),
    Option("cgroup-dump-controller", REFUSED, (DUMP,), "see --manage-cgroups", "NAME"),
    Option("cgroup-yard", REFUSED, _CR, "see --manage-cgroups", "PATH"),
    Option("freeze-cgroup", REFUSED, (DUMP,), "a tree is stopped by ptrace; leave it out", "PATH"),
    Option("lsm-profile", REFUSED, (RESTORE,), "security labels are not set", "TYPE:NAME"),
    Option("lsm-mount-context", REFUSED, (RESTORE,), _NAMESPACES, "CONTEXT"),
    Option("weak-sysctls", REFUSED, (RESTORE,), _NAMESPACES, negatable=True),
    # Pages
    Option(
        "lazy-pages",
        DOES,
        (RESTORE,),
        "the daemon behind lazy-pages.socket brings pages when they are touched",
    ),
    Option(
        "lazy-pages",
        DOES,
        (PAGE_SERVER,),
        "images are given to a lazy-pages daemon; else a dump's pages are taken",
    ),
    Option(
        "lazy-pages",
        DOES,
        (DUMP,),
        "lazy pages stay where they are and are given to one lazy-pages daemon, ours or CRIU's",
    ),
    Option("page-server", DOES, (LAZY_PAGES,), "what the images lack comes from there", negatable=True),
    Option(
        "page-server", DOES, (DUMP,), "pages and pagemaps are stored there, CRIU's or ours", negatable=True
    ),
    Option(
        "address", DOES, (DUMP, PAGE_SERVER, LAZY_PAGES), "where a page server is; 127.0.0.1 otherwise", "IP"
    ),
    Option("port", DOES, (DUMP, PAGE_SERVER, LAZY_PAGES), "the same", "NUM"),
    Option(
        "insecure",
        DOES,
        (DUMP, PAGE_SERVER, LAZY_PAGES),
        "lazyproc's own: the other end may be anybody, which CRIU allows unasked; otherwise root or our user here",
        negatable=True,
    ),
    Option(
        "ps-socket",
        REFUSED,
        (DUMP, PAGE_SERVER, LAZY_PAGES),
        "a page server has an address; use --address and --port",
        "FD",
    ),
    Option(
        "tls",
        DOES,
        _REMOTE,
        "TLS 1.3; both ends show a certificate, and no other CA is trusted",
        negatable=True,
    ),
    Option("tls-cacert", DOES, _REMOTE, "the CA's certificate; /etc/pki/CA/cacert.pem otherwise", "FILE"),
    Option(
        "tls-cacrl",
        DOES,
        _REMOTE,
        "certificates that it has revoked; /etc/pki/CA/cacrl.pem otherwise, if it is there",
        "FILE",
    ),
    Option("tls-cert", DOES, _REMOTE, "our certificate; /etc/pki/criu/cert.pem otherwise", "FILE"),
    Option("tls-key", DOES, _REMOTE, "its key; /etc/pki/criu/private/key.pem otherwise", "FILE"),
    Option(
        "tls-no-cn-verify",
        DOES,
        (DUMP, LAZY_PAGES),
        "the server's certificate need not be for the name of --address",
    ),
    Option(
        "tls-no-cn-verify",
        ALWAYS,
        (PAGE_SERVER,),
        "who has a certificate of the CA may come, whatever its name",
    ),
    Option("track-mem", REFUSED, (DUMP,), _ITERATIVE, negatable=True),
    Option("prev-images-dir", REFUSED, (DUMP,), _ITERATIVE, "DIR"),
    Option("auto-dedup", REFUSED, WORKING, _ITERATIVE, negatable=True),
    Option("pre-dump-mode", ALWAYS, (DUMP,), "of a dump in steps only", "HOW"),
    Option("stream", REFUSED, _CR, "images are files in a folder", negatable=True),
    # Machine
    Option(
        "cpu-cap",
        ALWAYS,
        _CR,
        "registers of a processor with fewer features are refused, whatever is said",
        "[CAP]",
    ),
    Option("libdir", ALWAYS, WORKING, "there are no plugins", "DIR", "L"),
    Option("deprecated", ALWAYS, _CR, "nothing is deprecated", negatable=True),
    Option("allow-uprobes", PERMITS, (DUMP,), "programs with uprobes: refused", negatable=True),
    Option("pidfd-store", REFUSED, (DUMP,), _ITERATIVE, negatable=True),
)


def lookup(name: str) -> tuple[Option, bool] | None:
    """The row of the long option `name`, or of the only ones that begin so, and whether it is taken back (--no-)."""
    names = {option.name: (option, False) for option in OPTIONS}
    names |= {f"no-{option.name}": (option, True) for option in OPTIONS if option.negatable}
    if name in names:
        return names[name]
    found = [names[full] for full in names if full.startswith(name)]
    return found[0] if len(found) == 1 else None


def row(name: str, command: str) -> Option | None:
    """What becomes of an option in this command; None where it has no meaning."""
    return next((option for option in OPTIONS if option.name == name and command in option.commands), None)


def short(letter: str) -> Option | None:
    return next((option for option in OPTIONS if option.short == letter), None)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """The table for people: the option, where, what becomes of it, in which words."""
    for option in OPTIONS:
        names = f"-{option.short}, --{option.name}" if option.short else f"--{option.name}"
        argument = f" {option.argument}" if option.takes else ""
        words = option.words + (f" (only {', '.join(option.values)})" if option.values else "")
        yield names + argument, ", ".join(option.commands), option.kind.value, words
