"""CRIU's command line over lazyproc's own API: `lazyproc-criu`."""
