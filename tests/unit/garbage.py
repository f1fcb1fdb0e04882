"""Bytes that mean nothing."""

from __future__ import annotations

from hypothesis import strategies as st


def garbage(most: int) -> st.SearchStrategy[bytes]:
    """Of any length up to `most`: binary(max_size=most) makes a dozen bytes at most, which is no whole header."""
    return st.integers(0, most).flatmap(lambda size: st.binary(min_size=size, max_size=size))
