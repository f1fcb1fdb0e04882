"""The cffi hook; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "lazyproc/images/_pagemap_build.py:ffi",
        "lazyproc/kernel/_core_build.py:ffi",
        "lazyproc/pages/_server_build.py:ffi",
        "lazyproc/uffd/_pager_build.py:ffi",
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
