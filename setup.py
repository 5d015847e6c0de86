"""Compiles the C core. Everything else about the package is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["pylora/_build.py:ffibuilder", "pylora/_build.py:cuda_abi"])
