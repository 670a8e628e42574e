"""Builds mmrm_fast._native with CMake; metadata lives in pyproject.toml."""

import os
import shutil
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
        # Not the one in the cache of an earlier build, whose environment pip has removed.
        configure.append(f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}")
        try:
            subprocess.run(["cmake", *configure], check=True)
            subprocess.run(["cmake", "--build", build_dir], check=True)
            subprocess.run(["cmake", "--install", build_dir, "--prefix", str(package_dir.parent)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # The extension is optional: setuptools prints this as one warning and goes on without it.
            raise CompileError(f"{error}; mmrm_fast will run its torch and numpy references") from error


sources = ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())]
setup(
    # What CMake reads, so that a source distribution holds it.
    ext_modules=[Extension("mmrm_fast._native", sources=[], depends=sources, optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
