"""Stored outcomes of mutants, equivalent mutants, and the table of scores."""

from __future__ import annotations

import ast
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tree import ROOT

from mutations.sampling import Mutant

FOLDER = Path(__file__).parent
RESULTS, EQUIVALENT = FOLDER / "results.jsonl", FOLDER / "equivalent.toml"
SURVIVED = "survived"
EQUAL = "equivalent"
MINIMUM = 0.95


@dataclass(frozen=True)
class Result:
    """The outcome of a mutant as it is stored: one line of results.jsonl."""

    id: str
    area: str
    file: str
    line: int
    operator: str
    diff: str
    outcome: str
    test: str
    """The test that failed."""
    seconds: float
    tests: str
    """Hash of the tests that decided the outcome."""


def load(path: Path = RESULTS) -> dict[str, Result]:
    """Read the latest outcome of every mutant."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result.id: result for line in lines for result in [Result(**json.loads(line))]}


def append(result: Result, path: Path = RESULTS) -> None:
    """Store an outcome."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def compact(path: Path = RESULTS) -> None:
    """Leave only the latest outcome of every mutant."""
    results = sorted(load(path).values(), key=lambda result: (result.area, result.file, result.line, result.id))
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results), encoding="utf-8")


def equivalents(path: Path = EQUIVALENT) -> dict[str, str]:
    """Return the reason of every mutant that no test can tell from the original, by its identifier."""
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []) if path.exists() else []
    return {entry["id"]: entry["reason"] for entry in entries}


def digest(outcome: str, test: str, covering: Iterable[str], root: Path = ROOT) -> str:
    """Hash the tests that decide an outcome: the one that failed, or all that could fail."""
    deciding = covering if outcome == SURVIVED or not test else [test]
    total = hashlib.sha256()
    for each in sorted({text_of(test, root) for test in deciding}):
        total.update(each.encode() + b"\0")
    return total.hexdigest()[:16]


def text_of(test: str, root: Path = ROOT) -> str:
    """Return the source of a test function with its decorators, or of its file when that holds no such function."""
    file, _, name = test.partition("::")
    path = root / file
    if not path.exists():
        return ""
    return _functions(path).get(name.split("[", maxsplit=1)[0].rpartition("::")[2], path.read_text(encoding="utf-8"))


@cache
def _functions(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return {
        node.name: "".join(
            lines[min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1 : node.end_lineno]
        )
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def is_current(result: Result | None, covering: Sequence[str]) -> bool:
    """Tell whether a stored outcome still holds."""
    return result is not None and result.tests == digest(result.outcome, result.test, covering)


def table(mutants: Sequence[Mutant], results: Mapping[str, Result], equal: Mapping[str, str]) -> tuple[str, float]:
    """Format the scores by area, and return the total score."""
    rows, totals = [], [0, 0, 0, 0, 0]
    for area in dict.fromkeys(mutant.area for mutant in mutants):
        inside = [mutant for mutant in mutants if mutant.area == area]
        outcomes = [
            EQUAL if each.id in equal else results[each.id].outcome for each in inside if _known(each, results, equal)
        ]
        counts = [len(inside), *(outcomes.count(each) for each in ("killed", "timeout", SURVIVED, EQUAL))]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append((area, counts))
    rows.append(("all", totals))
    lines = [f"{'area':<14}{'sampled':>9}{'killed':>9}{'timeout':>9}{'survived':>10}{'equivalent':>12}{'score':>9}"]
    for name, (sampled, killed, timeout, survived, same) in rows:
        numbers = f"{sampled:>9}{killed:>9}{timeout:>9}{survived:>10}{same:>12}"
        lines.append(f"{name:<14}{numbers}{score(sampled, killed + timeout, same):>9.1%}")
    sampled, killed, timeout, _, same = totals
    return "\n".join(lines), score(sampled, killed + timeout, same)


def _known(mutant: Mutant, results: Mapping[str, Result], equal: Mapping[str, str]) -> bool:
    return mutant.id in results or mutant.id in equal


def score(sampled: int, killed: int, equivalent: int) -> float:
    """Return the share of the mutants that were killed, among those that could be."""
    return killed / (sampled - equivalent) if sampled > equivalent else 1.0
