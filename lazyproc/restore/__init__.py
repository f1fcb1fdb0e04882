"""A checkpoint becomes a running tree. Called as `lazyproc.restore(...)`, it is `run.restore`."""

from lazyproc.callables import make_callable

make_callable(__name__, "lazyproc.migrate.local")
