"""The compiled extension, the mark of a typed package, and what a source distribution holds beside the package.

Everything else is in pyproject.toml.

The extension is optional: where no compiler is found, the package installs without it and plain torch
serves (`mllm-fast info` says so).
"""

import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


class TypedBuild(build_py):
    """Writes the mark that PEP 561 wants into what is installed; in the checkout the folder shows its rooms alone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            (Path(self.build_lib) / "mllm_fast" / "py.typed").touch()


class WholeSource(sdist):
    """Takes tests, benchmarks, documents and headers along, so that what the source is unpacked to can be worked on."""

    def make_distribution(self) -> None:
        for folder in ("kernels", "tests", "benchmarks", "docs", "deploy", ".ci", ".github"):
            self.filelist.graft(folder)
        for pattern in ("*.md", "*.cff", "*.yml", "*.yaml", ".*.yaml", "Dockerfile", ".dockerignore", ".gitignore"):
            self.filelist.include(pattern)
        for folder in ("tests/artefacts", "tests/.hypothesis"):
            self.filelist.prune(folder)
        for pattern in ("*.py[cod]", "*.so", "*/.pytest_cache/*", "*/.ipynb_checkpoints/*"):
            self.filelist.global_exclude(pattern)
        super().make_distribution()


# the text picks its instruction set at run time, so no -march; -ffp-contract lets a * b + c become one fma
flags = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread"]
# GCC 12's own headers read what they leave uninitialised on purpose
flags += [] if sys.platform == "win32" else ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

extension = Pybind11Extension(
    "mllm_fast.kernels._cpu",
    ["kernels/bindings.cpp", *sorted(glob("kernels/*/cpu_kernel.cpp"))],
    depends=sorted(glob("kernels/**/*.h", recursive=True)),
    cxx_std=17,
    extra_compile_args=flags,
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    libraries=["dl"] if sys.platform == "linux" else [],
)
extension.optional = True

setup(ext_modules=[extension], cmdclass={"build_py": TypedBuild, "sdist": WholeSource})
