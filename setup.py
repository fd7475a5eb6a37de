"""Build script: the kernels of csrc/, where torch and a C++ compiler are there.

Everything else stands in pyproject.toml. The kernels use the stable part of libtorch and nothing of
Python: one library serves every torch from 2.10 and every Python from 3.10 on. Without torch in the
build environment (pip isolates it: use --no-build-isolation), or without a compiler, dcdet is
installed all the same and its operators run on torch.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

STABLE_ABI = "0x020a000000000000"  # torch 2.10
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]


def extensions() -> "list[Extension]":
    """What can be compiled here."""
    try:
        import torch
    except ImportError:
        return []
    libtorch = Path(torch.__file__).parent
    sources = [Path("csrc/bindings.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    return [
        Extension(
            "dcdet._C",
            sources=sorted(map(str, sources)),
            depends=["setup.py", *sorted(map(str, Path("csrc").rglob("*.h")))],
            include_dirs=[str(libtorch / "include")],
            library_dirs=[str(libtorch / "lib")],
            libraries=["c10", "torch_cpu", "torch"],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
        )
    ]


class Build(build_ext):
    """A library that does not compile is left out, with one line of warning."""

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:  # a missing or broken compiler fails in many ways
            # That of an earlier build would be installed in its place.
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:200]
            print(f"warning: dcdet's kernels were not compiled ({reason}); its operators run on "
                  "torch, slower", file=sys.stderr)  # fmt: skip

    def get_outputs(self) -> "list[str]":
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        build = self.get_finalized_command("build_py")
        for extension in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build, extension)
            if os.path.exists(regular):
                self.copy_file(regular, inplace, level=self.verbose)


class Wheel(bdist_wheel):
    """Compiled, a wheel is for every Python from 3.10 on."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
