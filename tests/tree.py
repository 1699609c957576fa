"""The source tree as the architecture tests read it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "lorabbit": ROOT / "services/shared/lorabbit",
    "lorabbit_server": ROOT / "services/server/lorabbit_server",
    "lorabbit_client": ROOT / "services/client/lorabbit_client",
    "lorabbit_cli": ROOT / "services/cli/lorabbit_cli",
    "lorabbit_bench": ROOT / "services/bench/lorabbit_bench",
}


@cache
def modules() -> list[Path]:
    """Return every module in services/."""
    return sorted(path for package in PACKAGES.values() for path in package.rglob("*.py"))


def tracked(*suffixes: str) -> list[Path]:
    """Return the files of the repository with one of these suffixes; in a source archive, all files that are there."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - git, on our own files
    names = listed.stdout.decode().splitlines() if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or [path for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return sorted(path for path in paths if path.suffix in suffixes and path.is_file())


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function and method of a module."""
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def classes(path: Path) -> Iterator[ast.ClassDef]:
    """Yield every class of a module."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            yield node


def where(path: Path) -> str:
    """Return a path relative to the repository."""
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    """Return the import name of a module in services/."""
    package = next(folder for folder in PACKAGES.values() if path.is_relative_to(folder))
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def names() -> frozenset[str]:
    """Return the import names of all modules in services/."""
    return frozenset(dotted(module) for module in modules())


@cache
def imports(path: Path) -> set[str]:
    """Return the import names of the project's modules that a module imports, except those for type checking only."""
    known = names()
    found: set[str] = set()
    for node in _at_run_time(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and what is below it, without the bodies of `if TYPE_CHECKING:`."""
    yield node
    skipped = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for child in [] if skipped else ast.iter_child_nodes(node):
        yield from _at_run_time(child)
