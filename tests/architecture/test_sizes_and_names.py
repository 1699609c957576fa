"""Sizes, names and packages that keep the code readable, and the one module that reads the environment."""

from __future__ import annotations

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tree import ROOT, classes, dotted, functions, imports, modules, parsed, tracked, where

MODULE_LINES = 500
FUNCTION_LINES = 60
PACKAGE_ENTRIES = 13
SMALL_LINES = 40
ALL_MODULES = 250
BANNED = {"utils", "util", "helpers", "helper", "misc"}
ENVIRONMENT = {"environ", "getenv", "putenv"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|farm)/[\w.-]+")
TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".tpl", ".json", ".txt", ".cfg", ".hcl", ".j2", "")
CHECKS = re.compile(r"pytest\.(?:raises|warns|fail|approx)|check_|assert_|expect\(|run_state_machine")
IMPORTERS = re.compile(r"^Importers: ((?:[\w., ]|\n)+)\.$", re.MULTILINE)


def sources() -> list[Path]:
    """Every Python file of the repository but the tests."""
    return [path for path in tracked(".py") if not path.is_relative_to(ROOT / "tests")]


def packages() -> list[Path]:
    return [path for path in modules() if path.stem == "__init__"]


def words(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def test_no_module_is_longer_than_500_lines() -> None:
    lengths = {where(path): path.read_text(encoding="utf-8").count("\n") for path in sources()}

    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{where(path)}:{function.lineno} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in sources()
        for function in functions(path)
    }

    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_a_package_holds_2_to_13_modules_or_packages() -> None:
    entries = {
        where(path.parent): sum(
            (child.suffix == ".py" and child.stem != "__init__") or (child / "__init__.py").is_file()
            for child in path.parent.iterdir()
        )
        for path in packages()
        if path.parent.name not in {"lorabbit", "lorabbit_client", "lorabbit_server", "lorabbit_cli"}
    }

    assert {name: count for name, count in entries.items() if not 2 <= count <= PACKAGE_ENTRIES} == {}


def test_no_package_holds_more_than_13_modules_of_its_own() -> None:
    held = Counter(where(path.parent) for path in modules() if path.stem != "__init__")

    assert {name: count for name, count in held.items() if count > PACKAGE_ENTRIES} == {}


def test_there_are_at_most_250_modules() -> None:
    assert sum(path.stem != "__init__" for path in modules()) <= ALL_MODULES


def test_a_small_module_with_one_importer_is_part_of_that_importer() -> None:
    """Methods are exempt: each has a file of its own."""
    importers: Counter[str] = Counter()
    for path in sources():
        importers.update(imports(path))
    small = {
        dotted(path): importers[dotted(path)]
        for path in modules()
        if path.stem not in {"__init__", "__main__"}
        and path.parent.name not in {"shared_model", "personal_model"}
        and path.read_text(encoding="utf-8").count("\n") < SMALL_LINES
    }

    assert {name: count for name, count in small.items() if count == 1} == {}


def test_no_modules_import_each_other_in_a_cycle() -> None:
    graph = {dotted(path): imports(path) - {dotted(path)} for path in modules()}

    order = list(TopologicalSorter(graph).static_order())

    assert set(order) == set(graph)


def test_no_module_or_class_has_a_catch_all_name() -> None:
    named = [(where(path), path.stem) for path in sources()]
    named += [(f"{where(path)}:{node.lineno}", node.name) for path in sources() for node in classes(path)]

    assert [(place, name) for place, name in named if words(name) & BANNED] == []


def test_a_class_name_has_one_meaning_in_all_packages() -> None:
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in classes(path):
            places.setdefault(node.name, []).append(f"{where(path)}:{node.lineno}")

    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_module_has_a_docstring() -> None:
    assert [where(path) for path in modules() if not ast.get_docstring(parsed(path))] == []


def test_a_package_names_every_package_that_imports_it() -> None:
    """`Importers:` in the docstring of a package lists packages, or says "any package" or "none"."""
    allowed: dict[str, set[str]] = {}
    for path in packages():
        listed = IMPORTERS.search(ast.get_docstring(parsed(path)) or "")
        assert listed, f"{where(path)} has no line 'Importers: ...'"
        allowed[dotted(path)] = set(re.split(r",\s*", listed.group(1).replace("\n", " ")))
    everything = {dotted(path) for path in modules()}
    unknown = {name for names in allowed.values() for name in names} - everything - {"any package", "none"}
    intruders = [
        f"{importer} imports {imported}"
        for importer, imported in ((dotted(path), name) for path in modules() for name in imports(path))
        if not is_allowed(importer, owner(imported, allowed), allowed)
    ]

    assert unknown == set()
    assert intruders == []


def owner(module: str, known: dict[str, set[str]]) -> str:
    while module not in known:
        module = module.rpartition(".")[0]
    return module


def is_allowed(importer: str, package: str, allowed: dict[str, set[str]]) -> bool:
    """Whether a module is inside a package, above it, or among those that the package names."""
    names = allowed[package]
    return "any package" in names or any(f"{importer}.".startswith(f"{name}.") for name in {*names, package})


def test_every_test_asserts_something() -> None:
    empty = [
        f"{where(path)}:{test.lineno} {test.name}"
        for path in tracked(".py")
        if path.is_relative_to(ROOT / "tests")
        for test in functions(path)
        if test.name.startswith("test") and not asserts(test, path)
    ]

    assert empty == []


def asserts(test: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> bool:
    if any(isinstance(node, ast.Assert) for node in ast.walk(test)):
        return True
    return bool(CHECKS.search(ast.get_source_segment(path.read_text(encoding="utf-8"), test) or ""))


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{where(path)}:{number} {match.group(0)}"
        for path in tracked(*TEXT)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if (match := MACHINE_PATH.search(line))
    ]

    assert found == []


def test_only_the_settings_read_the_environment() -> None:
    readers = {where(path) for path in modules() if reads_environment(path)}

    assert readers <= {"services/shared/lorabbit/config/settings.py"}


def reads_environment(path: Path) -> bool:
    nodes = list(ast.walk(parsed(path)))
    # Some libraries take a value only through the environment: writing a default is allowed.
    written = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "setdefault"]
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and node not in written)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {n.name for n in node.names} & ENVIRONMENT)
        for node in nodes
    )


@pytest.mark.parametrize("name", ["JobHelper", "string_utils", "MiscEvents"])
def test_catch_all_names_are_recognized(name: str) -> None:
    assert words(name) & BANNED
