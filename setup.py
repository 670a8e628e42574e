"""Builds mmrm_fast._native with CMake; metadata lives in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake and Ninja in place of the compiler calls of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = str(Path(self.build_temp).resolve())
        package_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = ["-S", str(ROOT), "-B", build_dir, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure.append(f"-DWITH_CUDA={os.environ.get('WITH_CUDA', '1')}")
        try:
            subprocess.run(["cmake", *configure], check=True)
            subprocess.run(["cmake", "--build", build_dir], check=True)
            subprocess.run(["cmake", "--install", build_dir, "--prefix", str(package_dir.parent)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # The extension is optional: setuptools prints this as one warning and goes on without it.
            raise CompileError(f"{error}; mmrm_fast will run its torch and numpy references") from error


setup(
    ext_modules=[Extension("mmrm_fast._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
