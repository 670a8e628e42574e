"""Runs the core tests with the lowest versions that pyproject.toml declares and with the newest that it admits.

    pip install uv && python scripts/check_versions.py

Each set is installed into an environment of its own: minutes, and gigabytes where torch brings CUDA's libraries. The
table at the end names every package; the status is 1 if a test failed. Needs Python 3.11 or later.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tomllib
import tyro
from packaging.requirements import Requirement
from packaging.version import Version

from mmrm_fast.tables import print_table

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
APART = ("serve", "score", "evaluate", "study", "test_benchmarks.py", "test_client.py", "test_examples.py")
CORE = [f"--ignore=tests/{name}" for name in APART]  # processes and servers, which .ci/run tests


@dataclass(frozen=True)
class Outcome:
    """One set: versions by package, and how its tests ended."""

    packages: dict[str, str]
    closing_line: str
    failed: bool


def check_versions(
    sets: tuple[Literal["lowest", "newest"], ...] = ("lowest", "newest"),
    lowest_python: str = "3.10",
    newest_python: str = "3.13",
) -> int:
    """Install and test each set.

    Args:
        sets: which.
        lowest_python, newest_python: version or path of its interpreter.
    """
    pythons = {"lowest": lowest_python, "newest": newest_python}
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {name: test_set(Path(folder) / name, name, pythons[name]) for name in sets}
    rows = [
        [package, bound, *(marked(outcomes[name].packages[package], bound, name) for name in sets)]
        for package, bound in declared_bounds().items()
    ]
    rows += [(), ["core tests", "", *(outcome.closing_line for outcome in outcomes.values())]]
    print_table("Versions (* more than declared: another package needs it)", ["package", "declared", *sets], rows)
    return int(any(outcome.failed for outcome in outcomes.values()))


def marked(version: str, bound: str, name: str) -> str:
    """The installed version, with a star where the lowest set has not the lowest."""
    return version + "*" * (name == "lowest" and Version(Version(version).public) != Version(bound))


def declared_bounds() -> dict[str, str]:
    """The lower bound of every package that a user, a server or a test needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = {}
    for requirement in map(Requirement, [*project["dependencies"], *extras["serve"], *extras["test"]]):
        lower = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        bounds |= {requirement.name.lower(): version for version in lower}
    return bounds


def test_set(folder: Path, name: str, python: str) -> Outcome:
    """Install one set beside a copy of the working tree, whose native module is built for it, and run its tests."""
    copy_tree(folder)
    environment = os.environ | {"VIRTUAL_ENV": str(folder / "venv"), "WITH_CUDA": "0"}
    environment["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    environment.pop("PYTHONPATH", None)

    def run(*command: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=folder, env=environment, text=True, **options)

    print(f"{name}: installing", file=sys.stderr)
    run("uv", "venv", "--quiet", "--python", python, "venv", check=True)
    install = ("uv", "pip", "install", "--quiet", "--resolution", RESOLUTION[name], "--editable", ".[test]")
    run(*install, check=True)
    listing = run("uv", "pip", "list", "--quiet", "--format", "json", check=True, stdout=subprocess.PIPE).stdout
    packages = {package["name"].lower(): package["version"] for package in json.loads(listing)}
    print(f"{name}: testing", file=sys.stderr)
    tests = run("python", "-m", "pytest", "-q", *CORE, stdout=subprocess.PIPE)
    if tests.returncode:
        print(tests.stdout)
    return Outcome(packages, tests.stdout.splitlines()[-1], tests.returncode != 0)


def copy_tree(folder: Path) -> None:
    """The files that git tracks or does not ignore, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


if __name__ == "__main__":
    sys.exit(tyro.cli(check_versions))
