"""Typed face of the cffi module; see _pagemap.h for what each function does."""

from typing import Any

ffi: Any
lib: Any
