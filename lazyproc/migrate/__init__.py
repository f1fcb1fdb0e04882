"""The order of a migration, seen from both sides. Called as `lazyproc.migrate(...)`, it is `source.migrate`."""

from lazyproc.callables import make_callable

make_callable(__name__, "lazyproc.migrate.source")
