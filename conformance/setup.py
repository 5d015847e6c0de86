"""Copies the kit out of pylora beside it (tools/make_kit.py); an sdist has the copy already."""

import runpy
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
MAKER = HERE.parent / "tools" / "make_kit.py"
if MAKER.is_file():
    runpy.run_path(str(MAKER))["make"](HERE / "src")

setup()
