"""Adding a method is a file, a line in the registry, a test, a page and an example job: all five or none."""

from __future__ import annotations

import pytest
import yaml
from tree import PACKAGES, ROOT

from lorabbit.methods.registry import METHODS

NOT_A_METHOD = {"__init__", "averaging", "base", "session"}


def missing_parts(name: str) -> list[str]:
    """What a method of the registry still lacks."""
    module = PACKAGES["lorabbit"] / f"methods/{name.replace('-', '_')}.py"
    parts = {
        f"its file {module.relative_to(ROOT)}": module.is_file(),
        f"a test that names {METHODS[name].__name__} in tests/unit": has_test(METHODS[name].__name__),
        f"its page docs/methods/{name}.md": (ROOT / f"docs/methods/{name}.md").is_file(),
        f"an example job in examples/ with method.name: {name}": name in methods_of_examples(),
    }
    return [part for part, there in parts.items() if not there]


def has_test(class_name: str) -> bool:
    return any(class_name in path.read_text(encoding="utf-8") for path in (ROOT / "tests/unit").rglob("test_*.py"))


def methods_of_examples() -> set[str]:
    jobs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").rglob("*.yaml")]
    return {job.get("method", {}).get("name", "fedavg") for job in jobs}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_all_five_of_its_parts(name: str) -> None:
    assert missing_parts(name) == []


def test_every_method_file_is_in_the_registry() -> None:
    files = {path.stem for path in (PACKAGES["lorabbit"] / "methods").glob("*.py")} - NOT_A_METHOD

    assert files == {name.replace("-", "_") for name in METHODS}
