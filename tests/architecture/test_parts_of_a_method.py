"""Adding a method is a file, a line in the registry, a test, a page and an example job: all five or none."""

from __future__ import annotations

from pathlib import Path

import yaml
from cases import for_each
from tree import PACKAGES, ROOT

from lorabbit.methods.registry import METHODS

FAMILIES = ("shared_model", "personal_model")
NOT_A_METHOD = {"__init__", "requirements"}


def missing_parts(name: str) -> list[str]:
    """What a method of the registry still lacks."""
    file = f"{name.replace('-', '_')}.py"
    parts = {
        f"its file {file} in methods/{FAMILIES}": sum(path.name == file for path in method_files()) == 1,
        f"a test that names {METHODS[name].__name__} in tests/unit": has_test(METHODS[name].__name__),
        f"its page docs/methods/{name}.md": (ROOT / f"docs/methods/{name}.md").is_file(),
        f"an example job in examples/ with method.name: {name}": name in methods_of_examples(),
    }
    return [part for part, there in parts.items() if not there]


def method_files() -> list[Path]:
    folder = PACKAGES["lorabbit"] / "methods"
    return [path for family in FAMILIES for path in (folder / family).glob("*.py") if path.stem not in NOT_A_METHOD]


def has_test(class_name: str) -> bool:
    return any(class_name in path.read_text(encoding="utf-8") for path in (ROOT / "tests/unit").rglob("test_*.py"))


def methods_of_examples() -> set[str]:
    jobs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").rglob("*.yaml")]
    return {job.get("method", {}).get("name", "fedavg") for job in jobs}


@for_each(name=sorted(METHODS))
def test_a_method_has_all_five_of_its_parts(name: str) -> None:
    assert missing_parts(name) == []


def test_every_method_file_is_in_the_registry() -> None:
    assert {path.stem for path in method_files()} == {name.replace("-", "_") for name in METHODS}
