"""The package is a stack of layers: a module imports only modules to its left, heavy libraries stay in their place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmrm_fast

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
ORDER = CONTRIBUTING.partition("checks it):")[2].partition("Speed-ups")[0].split()
PACKAGE = Path(mmrm_fast.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer(path: Path) -> str:
    """The layer of a file: a folder such as `ops` is one layer."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at its top or inside functions; `from a import b` is `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layers_importing(package: str) -> set[str]:
    return {layer(path) for path in FILES if any(within(name, package) for name in imports(path))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_modules_to_its_left(path):
    assert layer(path) in ORDER, "a new module needs a place in the order"
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("mmrm_fast.")}
    imported &= {layer(other) for other in FILES}
    right = set(ORDER[ORDER.index(layer(path)) :]) - ({"ops"} if layer(path) == "ops" else set())
    assert not imported & right


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("ray", {"cluster", "score", "serve"}), ("torch.distributed", {"sharding", "checkpoint", "train"})],
)
def test_heavy_libraries_are_imported_only_where_they_belong(package, allowed):
    assert layers_importing(package) <= allowed


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["mmrm_fast"], ["torch", "ray"]),
        (["mmrm_fast." + name for name in ("config", "images", "records", "shapes")], ["torch", "ray", "transformers"]),
    ],
    ids=["the package", "the host-only modules"],
)
def test_importing_leaves_heavy_libraries_alone(modules, absent):
    code = f"import sys, {', '.join(modules)}; print(*(set({absent}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
