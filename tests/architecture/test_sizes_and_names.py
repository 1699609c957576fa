"""Sizes and names that keep the code readable, and the one reader of the environment."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tree import functions, modules, parsed, where

MODULE_LINES = 300
FUNCTION_LINES = 50
BANNED = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler", "processor"}
ENVIRONMENT = {"environ", "getenv", "putenv"}


def words(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def test_no_module_is_longer_than_three_hundred_lines() -> None:
    lengths = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}

    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES} == {}


def test_no_function_is_longer_than_fifty_lines() -> None:
    lengths = {
        f"{where(path)}:{function.lineno} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in modules()
        for function in functions(path)
    }

    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_no_module_or_class_has_a_name_that_says_nothing() -> None:
    named = [(where(path), path.stem) for path in modules()] + [
        (f"{where(path)}:{node.lineno}", node.name)
        for path in modules()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    ]

    assert [(place, name) for place, name in named if words(name) & BANNED] == []


def test_every_module_says_what_it_is_for() -> None:
    undocumented = [where(path) for path in modules() if path.stat().st_size and not ast.get_docstring(parsed(path))]

    assert undocumented == []


def test_only_the_settings_read_the_environment() -> None:
    readers = {where(path) for path in modules() if reads_environment(path)}

    assert readers <= {"services/shared/lorabbit/config/settings.py"}


def reads_environment(path: Path) -> bool:
    nodes = list(ast.walk(parsed(path)))
    # Some libraries are told something only through the environment: a default may be written.
    told = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "setdefault"]
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and node not in told)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {n.name for n in node.names} & ENVIRONMENT)
        for node in nodes
    )


@pytest.mark.parametrize("name", ["JobManager", "string_utils", "EventHandler"])
def test_the_names_that_say_nothing_are_recognised(name: str) -> None:
    assert words(name) & BANNED
