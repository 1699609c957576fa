"""The source tree as the architecture tests read it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "lorabbit": ROOT / "services/shared/lorabbit",
    "lorabbit_server": ROOT / "services/server/lorabbit_server",
    "lorabbit_client": ROOT / "services/client/lorabbit_client",
    "lorabbit_cli": ROOT / "services/cli/lorabbit_cli",
}


def modules() -> list[Path]:
    """Every module of the product."""
    return sorted(path for package in PACKAGES.values() for path in package.rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def where(path: Path) -> str:
    """A module's path as a person would say it."""
    return str(path.relative_to(ROOT))
