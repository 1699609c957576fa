"""The sample of mutants: what it consists of; and that a mutant is told from an equivalent one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from cosmic_ray.plugins import operator_names

from mutations import outcomes
from mutations.__main__ import SAMPLE, SEED
from mutations.coverage_map import CoverageMap, line_table
from mutations.outcomes import Result
from mutations.sampling import AREAS, compiles, mutant_at, positions, sample
from mutations.trial import Verdict, Workspace

MODULE = '''
"""Docstring with 1 + 1."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 3 - 2


def larger(left: "int | None", right: 2 + 2 = 1) -> 5:
    # 4 > 3
    return left if left > right else right
'''
TINY = "tests/unit/test_tiny.py"
TEST = """
from tiny import larger

def test_the_larger_number_is_returned():
    assert larger(1, 2) == 2
    assert larger(3, 3) == 3
"""


@pytest.fixture(scope="module")
def drawn():
    return sample(SAMPLE, SEED)


def tiny(folder: Path, operator: str) -> tuple[Workspace, str]:
    """A repository with one module and one test, and the module's text after a mutation."""
    root = folder / "root"
    (root / TINY).parent.mkdir(parents=True)
    (root / "tiny.py").write_text(MODULE, encoding="utf-8")
    (root / TINY).write_text(TEST, encoding="utf-8")
    (position,) = [each for each in positions("tiny.py", MODULE) if each.operator == operator]
    mutant = mutant_at(position, "tiny", MODULE)
    assert mutant is not None
    return Workspace(folder / "copy", ["."], root), mutant.source


def test_every_area_has_the_same_number_of_mutants(drawn) -> None:
    mutants, _ = drawn

    by_area = [sum(mutant.area == area for mutant in mutants) for area in AREAS]

    assert len(mutants) >= 100
    assert len({mutant.id for mutant in mutants}) == len(mutants)
    assert set(by_area) == {len(mutants) // len(AREAS)}


def test_every_operator_with_a_position_has_a_mutant(drawn) -> None:
    mutants, operators = drawn

    assert {mutant.operator for mutant in mutants} == set(operators)
    assert set(operators) <= set(operator_names())
    # The targets hold no shift to the right, no exclusive or, no plus sign before a number, and `~` only where `not` is
    # a syntax error.
    absent = {name.removeprefix("core/Replace") for name in operator_names() if name not in operators}
    replaced = {"_".join(name.split("_")[:2]) for name in absent}
    assert replaced <= {"BinaryOperator_RShift", "BinaryOperator_BitXor", "UnaryOperator_UAdd", "UnaryOperator_Invert"}


def test_every_mutant_compiles(drawn) -> None:
    mutants, _ = drawn

    assert [mutant.id for mutant in mutants if not compiles(mutant.source)] == []


def test_no_mutant_changes_a_docstring_a_comment_or_an_annotation() -> None:
    changed = [mutant_at(position, "tiny", MODULE) for position in positions("tiny.py", MODULE)]
    texts = [mutant.source for mutant in changed if mutant is not None]

    assert len(texts) > 5
    for text in texts:
        assert "Docstring with 1 + 1." in text
        assert "# 4 > 3" in text
        assert "LIMIT = 3 - 2" in text
        (function,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        annotations = [function.returns, *(argument.annotation for argument in function.args.args)]
        assert [ast.unparse(each) for each in annotations if each] == ["5", "'int | None'", "2 + 2"]


def test_a_mutant_is_killed_by_a_test_that_fails(tmp_path) -> None:
    workspace, source = tiny(tmp_path, "core/ReplaceComparisonOperator_Gt_Lt")
    test = f"{TINY}::test_the_larger_number_is_returned"

    workspace.verify(["tiny"])

    assert workspace.judge("tiny.py", source, [test], {test: 0.0}) == Verdict("killed", test)


def test_an_equivalent_mutant_survives(tmp_path) -> None:
    workspace, source = tiny(tmp_path, "core/ReplaceComparisonOperator_Gt_GtE")
    test = f"{TINY}::test_the_larger_number_is_returned"

    assert workspace.judge("tiny.py", source, [test], {test: 0.0}) == Verdict("survived")


def test_tests_of_a_line_follow_it_when_lines_are_added_above() -> None:
    mutant = next(
        made
        for position in positions("tiny.py", MODULE)
        if position.operator == "core/ReplaceComparisonOperator_Gt_Lt" and (made := mutant_at(position, "tiny", MODULE))
    )
    older = MODULE.replace('"""Docstring with 1 + 1."""\n', "")
    coverage = CoverageMap("", {"tiny.py": older}, {"slow": 2.0, "fast": 1.0}, {})
    coverage.lines = {"slow": {"tiny.py": [mutant.line - 1]}, "fast": {"tiny.py": [mutant.line - 1]}}

    assert line_table(older, MODULE)[mutant.line - 1] == mutant.line
    assert coverage.covering(mutant, MODULE) == ["fast", "slow"]


def test_an_outcome_is_stale_once_a_test_that_decided_it_changes(tmp_path) -> None:
    older, newer = tmp_path / "older", tmp_path / "newer"
    for folder, number in ((older, 1), (newer, 2)):
        folder.mkdir()
        text = f"def test_one():\n    assert {number}\n\ndef test_two():\n    assert 3\n"
        (folder / "test_a.py").write_text(text, encoding="utf-8")
    both = ["test_a.py::test_one", "test_a.py::test_two[x]"]

    def is_same(outcome, test):
        return outcomes.digest(outcome, test, both, older) == outcomes.digest(outcome, test, both, newer)

    assert not is_same("survived", "")
    assert not is_same("killed", both[0])
    assert is_same("killed", both[1])


def test_stored_outcomes_are_read_again_and_the_latest_counts(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    result = Result("a", "engine", "file.py", 1, "core/AddNot", "", "survived", "", 1.0, "")
    later = Result("a", "engine", "file.py", 1, "core/AddNot", "", "killed", "test", 1.0, "")

    outcomes.append(result, path)
    outcomes.append(later, path)
    outcomes.compact(path)

    assert path.read_text(encoding="utf-8").count("\n") == 1
    assert outcomes.load(path) == {"a": later}


def test_every_equivalent_mutant_has_a_reason() -> None:
    assert [name for name, reason in outcomes.equivalents().items() if not reason.strip()] == []


def test_the_score_leaves_equivalent_mutants_out() -> None:
    assert outcomes.score(sampled=100, killed=90, equivalent=5) == pytest.approx(90 / 95)
