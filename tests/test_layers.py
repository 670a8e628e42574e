"""The package is a stack of layers: a package imports only those to its left, heavy libraries stay in their place."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mmrm_fast

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(RULE,) = re.findall(r"^    (files .* < cli)$", CONTRIBUTING, flags=re.M)
LAYERS = [re.findall(r"\w+", layer) for layer in RULE.split(" < ")]
RANK = {name: number for number, layer in enumerate(LAYERS) for name in layer}
PACKAGE = Path(mmrm_fast.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
PACKAGES = sorted({name.partition(".")[0] for name in MODULES if "." in name})
HOST_ONLY = ["mmrm_fast." + name for name in ("config", "pairs", "data.images", "data.records", "data.shapes")]
MAX_LINES, MAX_TOP_MODULES = 400, 10


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names of everything a module imports, at its top or inside functions; `from a import b` is `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def own_imports(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    names = {name.removeprefix("mmrm_fast.") for name in imports(module) if name.startswith("mmrm_fast.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)


def importers(library: str) -> set[str]:
    """The packages and top modules that import a library."""
    return {
        module.partition(".")[0]
        for module in MODULES
        if any(name == library or name.startswith(library + ".") for name in imports(module))
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_to_its_left(module):
    own = module.partition(".")[0]
    assert own in RANK, "a new package or module needs a place in CONTRIBUTING's line"
    others = {name.partition(".")[0] for name in own_imports(module)} - {own}
    same_layer_of_modules = set(LAYERS[0]) if own in LAYERS[0] else set()
    assert not {name for name in others if RANK[name] >= RANK[own]} - same_layer_of_modules


def test_pairs_sees_types_alone():
    assert own_imports("pairs") <= {"data.types", "files"}


@pytest.mark.parametrize("package", ["", *PACKAGES], ids=["the top", *PACKAGES])
def test_no_circle_inside_a_package(package):
    inside = [name for name in MODULES if name.rpartition(".")[0] == package]
    try:
        TopologicalSorter({name: own_imports(name) & set(inside) for name in inside}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_house_stays_readable():
    long = {name: path.read_text().count("\n") for name, path in MODULES.items()}
    assert not {name: lines for name, lines in long.items() if lines > MAX_LINES}
    assert sum("." not in name for name in MODULES) <= MAX_TOP_MODULES


@pytest.mark.parametrize(("library", "allowed"), [("ray", {"score", "serve"}), ("torch.distributed", {"train"})])
def test_heavy_libraries_are_imported_only_where_they_belong(library, allowed):
    assert importers(library) <= allowed


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["mmrm_fast", "mmrm_fast.client"], ["torch", "ray", "numpy"]),
        (
            ["mmrm_fast." + name for name in ("config", "pairs", "data.images", "data.records", "data.shapes")],
            ["torch", "ray", "transformers"],
        ),
    ],
    ids=["the package", "the host-only modules"],
)
def test_importing_leaves_heavy_libraries_alone(modules, absent):
    code = f"import sys, {', '.join(modules)}; print(*(set({absent}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
