"""CRIU's own tests (zdtm) with `lazyproc-criu` in CRIU's place, from a tree of CRIU's that lies outside."""
