"""Invariants of the four papers are tests named by their ids, and each method's page says where these are."""

from __future__ import annotations

import re

from cases import for_each
from tree import ROOT

TABLES = {"sa-fedlora": ("U", 13), "pfedlora": ("J", 15), "federa": ("I", 14), "fibecfed": ("F", 15)}
"""Letter of a method's invariants, and how many there are; docs/methods/<name>.md says what they are about."""
NAME = re.compile(r"^def (test_\w+)", re.MULTILINE)
ID = re.compile(r"_([UJIF]\d+)(?=_)")


def files_by_id() -> dict[str, set[str]]:
    """Files, relative to the root, by the id that a test in them has in its name."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in NAME.findall(path.read_text(encoding="utf-8")):
            for each in ID.findall(name):
                found.setdefault(each, set()).add(str(path.relative_to(ROOT)))
    return found


@for_each(method=sorted(TABLES))
def test_every_invariant_has_a_test_of_its_name(method: str) -> None:
    letter, number = TABLES[method]

    assert [each for n in range(1, number + 1) if (each := f"{letter}{n}") not in files_by_id()] == []


def test_no_test_has_the_name_of_an_invariant_that_is_not_there() -> None:
    known = {f"{letter}{n}" for letter, number in TABLES.values() for n in range(1, number + 1)}

    assert set(files_by_id()) - known == set()


@for_each(method=sorted(TABLES))
def test_a_methods_page_names_every_file_that_holds_one_of_its_invariants(method: str) -> None:
    page = (ROOT / f"docs/methods/{method}.md").read_text(encoding="utf-8")
    letter, number = TABLES[method]
    files = set().union(*(files_by_id()[f"{letter}{n}"] for n in range(1, number + 1)))

    assert sorted(file for file in files if file.rpartition("/")[2] not in page) == []
