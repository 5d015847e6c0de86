"""Compiles the C core, and the CUDA library where nvcc is found. Everything else about the package
is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = runpy.run_path(str(ROOT / "tools" / "build_cuda.py"))


class Build(build_ext):
    def run(self) -> None:
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "pylora" / "backends"
        CUDA["build"](package, ROOT / "build" / "cuda")


setup(
    cmdclass={"build_ext": Build},
    cffi_modules=["tools/build_core.py:ffibuilder", "tools/build_core.py:cuda_abi"],
)
