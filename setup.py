"""Compiles the C core, all cores at once, and the CUDA library where it was asked for or a GPU is
there. Everything else about the package is in pyproject.toml."""

import os
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CORE = runpy.run_path(str(ROOT / "tools" / "build_core.py"))
CUDA = runpy.run_path(str(ROOT / "tools" / "build_cuda.py"))
# Where objects are kept for the next build, and libpylora.a for tests and examples to link with.
OBJECTS = Path(os.environ.get("PYLORA_OBJECTS") or ROOT / "build" / "core").resolve()


class Build(build_ext):
    def build_extension(self, ext) -> None:
        ext.extra_objects = CORE["compile_core"](self.compiler, OBJECTS)
        ext.depends = [*ext.depends, *ext.extra_objects]
        super().build_extension(ext)

    def run(self) -> None:
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "pylora" / "backends"
        CUDA["build"](package, ROOT / "build" / "cuda")


setup(
    cmdclass={"build_ext": Build},
    cffi_modules=["tools/build_core.py:ffibuilder", "tools/build_core.py:cuda_abi"],
    # One wheel for every Python from this one on: the core uses the limited interface alone.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
