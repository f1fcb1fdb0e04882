"""lazyproc moves running Linux processes and lets their memory follow. The public names, imported when first used."""

from importlib import import_module

TYPE_CHECKING = False  # typing itself costs 5 ms of every start
if TYPE_CHECKING:
    from lazyproc import errors as errors
    from lazyproc.dump.checkpoint import CheckpointReport as CheckpointReport
    from lazyproc.dump.checkpoint import checkpoint as checkpoint
    from lazyproc.dump.permits import Permits as Permits
    from lazyproc.migrate.arrival import Terms as Terms
    from lazyproc.migrate.destination import receive as receive
    from lazyproc.migrate.explain import explain as explain
    from lazyproc.migrate.explain import explain_guest as explain_guest
    from lazyproc.migrate.guest_checkpoint import checkpoint_guest as checkpoint_guest
    from lazyproc.migrate.guest_clone import qemu_clone as qemu_clone
    from lazyproc.migrate.guest_move import migrate_guest as migrate_guest
    from lazyproc.migrate.guest_serve import qemu_serve as qemu_serve
    from lazyproc.migrate.lazypages import lazy_pages as lazy_pages
    from lazyproc.migrate.local import PageServerOfCriu as PageServerOfCriu
    from lazyproc.migrate.local import restore as restore
    from lazyproc.migrate.order import Order as Order
    from lazyproc.migrate.server import serve as serve
    from lazyproc.migrate.sessions import abort as abort
    from lazyproc.migrate.sessions import resume as resume
    from lazyproc.migrate.sessions import sessions as sessions
    from lazyproc.migrate.source import migrate as migrate
    from lazyproc.pages.tls import Tls as Tls
    from lazyproc.restore.run import Restored as Restored
    from lazyproc.trace import read_trace as read_trace
    from lazyproc.uffd.region import LazyRegion as LazyRegion

_MODULES = {
    "CheckpointReport": "lazyproc.dump.checkpoint",
    "LazyRegion": "lazyproc.uffd.region",
    "abort": "lazyproc.migrate.sessions",
    "Order": "lazyproc.migrate.order",
    "PageServerOfCriu": "lazyproc.migrate.local",
    "Permits": "lazyproc.dump.permits",
    "Restored": "lazyproc.restore.run",
    "Terms": "lazyproc.migrate.arrival",
    "Tls": "lazyproc.pages.tls",
    "checkpoint": "lazyproc.dump.checkpoint",
    "checkpoint_guest": "lazyproc.migrate.guest_checkpoint",
    "explain": "lazyproc.migrate.explain",
    "explain_guest": "lazyproc.migrate.explain",
    "lazy_pages": "lazyproc.migrate.lazypages",
    "migrate_guest": "lazyproc.migrate.guest_move",
    "qemu_clone": "lazyproc.migrate.guest_clone",
    "qemu_serve": "lazyproc.migrate.guest_serve",
    "read_trace": "lazyproc.trace",
    "receive": "lazyproc.migrate.destination",
    "resume": "lazyproc.migrate.sessions",
    "serve": "lazyproc.migrate.server",
    "sessions": "lazyproc.migrate.sessions",
}
_PACKAGES = ("errors", "migrate", "restore")  # the last two are callable, see callables.py

__all__ = [
    "CheckpointReport",
    "LazyRegion",
    "Order",
    "PageServerOfCriu",
    "Permits",
    "Restored",
    "Terms",
    "Tls",
    "abort",
    "checkpoint",
    "checkpoint_guest",
    "errors",
    "explain",
    "explain_guest",
    "lazy_pages",
    "migrate",
    "migrate_guest",
    "qemu_clone",
    "qemu_serve",
    "read_trace",
    "receive",
    "restore",
    "resume",
    "serve",
    "sessions",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name in _PACKAGES:
        return import_module(f"lazyproc.{name}")
    raise AttributeError(f"module 'lazyproc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
