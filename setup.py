"""Builds csrc/ once for each instruction set; everything else is in pyproject.toml.

Needs torch and a C++ compiler (`pip install --no-build-isolation`). Without them, or with
LLAMAPRO_NO_EXTENSION=1, the package is complete but for the compiled ops on a CPU, which PyTorch
then serves. LLAMAPRO_SANITIZE=avx2 builds that one alone, with the address and
undefined-behaviour sanitizers.
"""

import copy
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {
        "avx2": ["-march=x86-64-v3"],
        "avx512": avx512,
        "avx512_bf16": [*avx512, "-mavx512bf16"],
        "amx": [*avx512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }
COMPILE = [
    *("-std=c++20", "-O3", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10 and later
]
INSTEAD = "PyTorch serves the ops instead"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1"]
SANITIZED = os.environ.get("LLAMAPRO_SANITIZE")


class BuildLibraries(build_ext):
    """Extensions that are loaded as libraries: they know nothing of Python.

    One that is not built leaves none of an earlier build behind, here or in the source tree. One
    that an editable install has built in the source tree goes into a wheel as it is.
    """

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension):
        if is_current(self.get_ext_filename(extension.name), extension):
            wanted = Path(self.get_ext_fullpath(extension.name))
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.get_ext_filename(extension.name), wanted)
            return
        # In a folder of its own: objects of all have the same names, and are compiled at once.
        build = copy.copy(self)
        build.build_temp = os.path.join(self.build_temp, extension.name)
        try:
            super(BuildLibraries, build).build_extension(extension)
        except Exception as error:
            say(f"{extension.name} is not built: {error}")
            for path in (self.get_ext_fullpath, self.get_ext_filename):
                Path(path(extension.name)).unlink(missing_ok=True)


def is_current(built, extension):
    """Whether the source tree holds this extension, built of its sources as they are."""
    sources = [*extension.sources, *extension.depends]
    return not SANITIZED and os.path.exists(built) and not newer_group(sources, built)


def extensions():
    """One for each instruction set; none, and a line that says why, where they cannot be built."""
    if os.environ.get("LLAMAPRO_NO_EXTENSION") == "1":
        return []
    if sys.platform != "linux":
        say(f"the compiled ops on a CPU are for Linux, this is {sys.platform}; {INSTEAD}")
        return []
    try:
        import torch
    except ImportError:
        say(f"no torch to build csrc/ with (is --no-build-isolation missing?); {INSTEAD}")
        return []
    root = Path(torch.__file__).parent
    sanitize = SANITIZE if SANITIZED else []
    return [
        Extension(
            f"llamapro_kernels.cpu_{name}",
            sources=sorted(str(source) for source in Path("csrc").glob("*.cpp")),
            depends=["setup.py", *sorted(str(header) for header in Path("csrc").glob("*.h"))],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu"],
            extra_compile_args=[*COMPILE, f"-isystem{root / 'include'}", *flags, *sanitize],
            extra_link_args=sanitize,
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if SANITIZED in (None, name)
    ]


def say(line):
    print(f"llamapro_kernels: {line}", file=sys.stderr)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries})
