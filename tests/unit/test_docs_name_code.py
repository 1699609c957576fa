"""Names of code in the documentation: modules, files, and the module map exist as they are written."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from tree import PACKAGES, ROOT

PAGES = sorted(
    path
    for path in (*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"))
    if path.name != "CHANGELOG.md"
)
MAP = ROOT / "docs/explanation/module-map.md"
FILES = {
    "/" + path.relative_to(ROOT).as_posix()
    for folder in ("services", "tests", "tools", "benchmarks", "docs", "examples", "helm")
    for path in (ROOT / folder).rglob("*.py")
}
MODULES = {
    ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    for root in PACKAGES.values()
    for path in root.rglob("*.py")
}
DOTTED = re.compile(r"`((?:lorabbit_(?:server|client|cli|bench)|lorabbit)(?:\.\w+)+)`")
NOT_CODE = re.compile(r"lorabbit\.(?:(?:adapter|client|commands|control|data|dead|pool|server|up)\b|[\w.]+\.v\d)")
"""Queues, exchanges, labels, message types and the entry point group."""


def resolves(name: str) -> bool:
    """Tell whether a dotted name is a module, or an attribute of one."""
    module, rest = name, []
    while module not in MODULES:
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
        if not module:
            return False
    value = import_module(module) if rest else None
    for part in rest:
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def test_every_dotted_name_in_the_docs_exists() -> None:
    names = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in PAGES
        if page != MAP
        for name in DOTTED.findall(page.read_text(encoding="utf-8"))
        if not NOT_CODE.match(name)
    }

    assert sorted((page, name) for page, name in names if not resolves(name)) == []


def test_every_python_file_that_the_docs_name_exists() -> None:
    named = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in PAGES
        for name in re.findall(r"`([\w/]+/\w+\.py)\b", page.read_text(encoding="utf-8"))
    }

    assert sorted((page, name) for page, name in named if not any(file.endswith("/" + name) for file in FILES)) == []


def test_the_architecture_page_names_every_package_with_all_its_modules() -> None:
    page = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(lorabbit[\w.]*)` \| [^|]+ \| ([^|]*) ?\|$", page, re.MULTILINE)
    named = {
        f"{package}.{module}" for package, cell in rows for module in re.findall(r"(?:^|<br>)`(\w+)`:", cell.strip())
    }

    packages = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    assert {package for package, _ in rows} == packages
    assert named == MODULES - packages


def test_the_module_map_leads_to_modules_that_exist() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    targets = {
        target
        for old, new in rows
        for target in ([old] if new == "unchanged" else re.findall(r"`(lorabbit[\w.]*)`", new))
    }

    assert rows
    assert targets <= MODULES


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("lorabbit.types.ClientUpdate", True),
        ("lorabbit.types", True),
        ("lorabbit.types.Absent", False),
        ("lorabbit.absent", False),
    ],
)
def test_a_dotted_name_resolves_to_a_module_or_its_attribute(name: str, is_there: bool) -> None:  # noqa: FBT001
    assert resolves(name) is is_there
