"""Build script: the kernels of csrc/, where torch and the compilers are there.

Everything else stands in pyproject.toml. The kernels use the stable part of libtorch and nothing of
Python: one library serves every torch from 2.10 and every Python from 3.10 on. Without torch in the
build environment (pip isolates it: use --no-build-isolation), or without a compiler, dcdet is
installed all the same and its operators run on torch.

The CUDA kernels are a library of their own, which a torch without CUDA leaves alone. They are
compiled where torch sees a GPU, so that nobody else waits for nvcc; DCDET_CUDA=1 compiles them
anywhere (a wheel for other machines), DCDET_CUDA=0 nowhere. nvcc is CUDA_HOME's, or the one on
PATH. DCDET_CUDA_ARCHS="90" names the architectures; without it a library serves all of them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

STABLE_ABI = "0x020a000000000000"  # torch 2.10
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
CUDA_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC", "-DUSE_CUDA"]
# Code for each, and for later ones code that the driver compiles.
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100")
CUDA = "dcdet._CUDA"


def extensions() -> "list[Extension]":
    """What can be compiled here."""
    try:
        import torch
    except ImportError:
        return []
    libtorch = Path(torch.__file__).parent
    headers = sorted(map(str, Path("csrc").rglob("*.h")))

    def extension(name: str, sources: "list[Path]", *libraries: str) -> Extension:
        return Extension(
            name,
            sources=sorted(map(str, sources)),
            depends=["setup.py", *headers],
            include_dirs=[str(libtorch / "include")],
            library_dirs=[str(libtorch / "lib")],
            libraries=["c10", "torch_cpu", "torch", *libraries],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
        )

    cpu = [Path("csrc/bindings.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    cuda = [Path("csrc/cuda/bindings.cpp"), *Path("csrc/cuda").glob("*.cu")]
    return [extension("dcdet._C", cpu), extension(CUDA, cuda, "torch_cuda")]


def wants_cuda() -> bool:
    """Whether the CUDA kernels are to be compiled."""
    asked = os.environ.get("DCDET_CUDA", "")
    if asked:
        return asked != "0"
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available()


def find_nvcc() -> str:
    """CUDA's compiler; FileNotFoundError where there is none."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if not found:
        raise FileNotFoundError("no nvcc, neither CUDA_HOME's nor on PATH")
    return found


def nvcc_command(extension: Extension, library: str) -> "list[str]":
    """How nvcc makes the library."""
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, text=True, check=True)
    asked = os.environ.get("DCDET_CUDA_ARCHS", "").split()
    archs = asked or [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known.stdout.split()]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [
        nvcc, "-shared", *CUDA_FLAGS, *code,
        *(f"-D{name}={value}" for name, value in extension.define_macros),
        *(f"-I{folder}" for folder in extension.include_dirs),
        *extension.sources, "-o", library,
        *(f"-L{folder}" for folder in extension.library_dirs),
        *(f"-l{name}" for name in extension.libraries),
    ]  # fmt: skip


class Build(build_ext):
    """A library that does not compile is left out, with one line of warning."""

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name == CUDA
        library = Path(self.get_ext_fullpath(extension.name))
        if cuda and not wants_cuda():
            library.unlink(missing_ok=True)
            return
        try:
            if cuda:
                self.build_cuda(extension, library)
            else:
                super().build_extension(extension)
        except Exception as error:  # a missing or broken compiler fails in many ways
            # That of an earlier build would be installed in its place.
            library.unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:200]
            which, where = ("CUDA kernels", "on a GPU ") if cuda else ("kernels", "")
            print(f"warning: dcdet's {which} were not compiled ({reason}); {where}its operators "
                  "run on torch, slower", file=sys.stderr)  # fmt: skip

    def build_cuda(self, extension: Extension, library: Path) -> None:
        newest = max(os.path.getmtime(file) for file in [*extension.sources, *extension.depends])
        if not self.force and library.exists() and library.stat().st_mtime > newest:
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        command = nvcc_command(extension, str(library))
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if made.returncode:
            lines = made.stdout.splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
            raise RuntimeError(errors[0] if errors else f"nvcc: exit code {made.returncode}")

    def get_outputs(self) -> "list[str]":
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        build = self.get_finalized_command("build_py")
        for extension in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build, extension)
            if os.path.exists(regular):
                self.copy_file(regular, inplace, level=self.verbose)
            else:
                Path(inplace).unlink(missing_ok=True)


class Wheel(bdist_wheel):
    """Compiled, a wheel is for every Python from 3.10 on."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
