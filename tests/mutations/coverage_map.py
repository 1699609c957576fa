"""Which tests execute which line: recorded once by coverage.py with a context for each test, and kept in `build/`.

The map stores the text of the measured files. Lines of a file that has changed since are translated by comparing the
texts, so a changed docstring does not make the map useless.

A line that runs at import, such as a decorator or a constant, belongs to no test. Instead, the tests of the function or
class that it belongs to are taken, and those that name the class or the constant or execute a line that names it; for
any other line of a module those of the whole file.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

import coverage
from tree import ROOT

from mutations import observer
from mutations.outcomes import text_of
from mutations.sampling import AREAS, Mutant, files_of

FOLDER = ROOT / "build" / "mutations"
SUITES = ("tests/unit", "tests/contract", "tests/integration")
MARKERS = "not containers and not chaos"
UNIT = "tests/unit/"
LINES_PER_SECOND = 1000
"""How many executed lines put a test as far back as a second does."""


@dataclass
class CoverageMap:
    """Tests by executed line."""

    commit: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    """The measured files as they were."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of every test that passed."""
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Executed lines by test and file."""

    @classmethod
    def load(cls, path: Path) -> CoverageMap:
        """Read a map from a file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write the map to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self)), encoding="utf-8")

    def merge(self, newer: CoverageMap) -> None:
        """Replace the tests of the test files that a newer map has."""
        files = {_file_of(test) for test in newer.seconds}
        old = [test for test in self.seconds if _file_of(test) not in files]
        # Lines of the older tests are those of the older texts.
        self.lines = {test: self._translated(self.lines[test], newer.sources) for test in old} | newer.lines
        self.seconds = {test: self.seconds[test] for test in old} | newer.seconds
        self.commit, self.sources = newer.commit, newer.sources

    def _translated(self, lines: Mapping[str, list[int]], sources: Mapping[str, str]) -> dict[str, list[int]]:
        found = {}
        for file, numbers in lines.items():
            table = line_table(self.sources[file], sources.get(file, ""))
            found[file] = [table[number] for number in numbers if number in table]
        return found

    def covering(self, mutant: Mutant, source: str) -> list[str]:
        """Return the tests that execute a mutant's line.

        Unit tests come first, the fastest and most specific first. The others follow file by file, because many files
        start a service.
        """
        if mutant.file not in self.sources:
            return []
        executed = self._executed(mutant.file, source)
        first, last = mutant.extent
        found = set().union(*(executed.get(number, ()) for number in range(first, last + 1)))
        if not found:
            found = set().union(*(executed.get(number, ()) for number in _owner(source, mutant.line)))
            found |= self._naming(_names(source, mutant.line))
        return self._best_first(found or set().union(*executed.values()))

    def _naming(self, names: Sequence[str]) -> set[str]:
        """Return the tests that name a constant or class, or execute a line that does."""
        if not names:
            return set()
        mention = re.compile(rf"\b(?:{'|'.join(names)})\b")
        found = {test for test in self.seconds if mention.search(text_of(test))}
        for file, text in self.sources.items():
            executed = self._executed(file, text)
            for number, line in enumerate(text.splitlines(), 1):
                if mention.search(line):
                    found |= executed.get(number, set())
        return found

    def _executed(self, file: str, source: str) -> dict[int, set[str]]:
        """Return the tests by the line that they execute, numbered as in a newer text of the file."""
        table = line_table(self.sources[file], source)
        executed: dict[int, set[str]] = defaultdict(set)
        for test, files in self.lines.items():
            for number in files.get(file, ()):
                if number in table:
                    executed[table[number]].add(test)
        return executed

    def _best_first(self, tests: Iterable[str]) -> list[str]:
        by_file: dict[str, list[float]] = defaultdict(list)
        for test in tests:
            by_file[_file_of(test)].append(self.seconds[test])

        def place(test: str) -> tuple[bool, float, str, float, str]:
            file, is_unit = _file_of(test), test.startswith(UNIT)
            # A test that executes few lines is more likely to be about this one.
            cost = self.seconds[test] + sum(len(lines) for lines in self.lines[test].values()) / LINES_PER_SECOND
            return not is_unit, 0.0 if is_unit else median(by_file[file]), "" if is_unit else file, cost, test

        return sorted(tests, key=place)


def _file_of(test: str) -> str:
    return test.split("::", maxsplit=1)[0]


@cache
def line_table(before: str, after: str) -> dict[int, int]:
    """Return the number of each unchanged line in a newer text by its number in the older one."""
    if before == after:
        return {number: number for number in range(1, before.count("\n") + 2)}
    blocks = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    return {
        block.a + offset + 1: block.b + offset + 1
        for block in blocks.get_matching_blocks()
        for offset in range(block.size)
    }


def _owner(source: str, line: int) -> Sequence[int]:
    """Return the lines of a function's body when its header holds a line, or of the class around the line."""
    best: range = range(0)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            inside = first <= line <= (node.end_lineno or first)
            if inside and (not best or first > best.start):
                body = node.body[0].lineno if not isinstance(node, ast.ClassDef) else first
                best = range(body, (node.end_lineno or body) + 1)
    return best


def _names(source: str, line: int) -> list[str]:
    """Return the names that a module binds by the statement on a line: constants, or a class."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.ClassDef):
            decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
            first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            if not first <= line <= (node.end_lineno or first):
                continue
            if isinstance(node, ast.ClassDef):
                return [node.name]
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


# ---- recording ----
def record(tests: Sequence[str] = SUITES, folder: Path = FOLDER) -> CoverageMap:
    """Run tests, one after the other, and return which lines they executed; tests that fail are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, data, log = folder / "coverage.ini", folder / "coverage.data", folder / "recording.jsonl"
    log.unlink(missing_ok=True)
    data.unlink(missing_ok=True)
    measured = sorted({file for targets in AREAS.values() for file in files_of(targets)})
    include = "\n".join(f"    {ROOT / file}" for file in measured)
    settings.write_text(f"[run]\ndata_file = {data}\ninclude =\n{include}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-m", MARKERS, "-p", "mutations.observer", "--timeout", "120"]
    command += ["-n", "1", "--dist", "loadfile", "--cov", f"--cov-config={settings}", "--cov-context=test"]
    command += ["--cov-report=", "-p", "no:cacheprovider", *tests]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MUTATIONS_LOG": str(log)}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)  # noqa: S603 - pytest, on our own tests
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in measured}
    seconds = _durations(log)
    return CoverageMap(head.stdout.strip(), sources, seconds, _executed(data, seconds))


def _durations(log: Path) -> dict[str, float]:
    """Return the seconds of each test that passed."""
    seconds: dict[str, float] = defaultdict(float)
    not_passed: set[str] = set()
    for event in observer.events(log):
        if event["event"] != "start":
            seconds[event["test"]] += event["seconds"]
        if event["event"] in {"failed", "skipped"}:
            not_passed.add(event["test"])
    return {test: round(duration, 3) for test, duration in seconds.items() if test not in not_passed}


def _executed(path: Path, tests: Iterable[str]) -> dict[str, dict[str, list[int]]]:
    """Return the lines of the measured files by test, as coverage.py stored them."""
    data = coverage.CoverageData(str(path))
    data.read()
    known, found = set(tests), {test: defaultdict(set) for test in tests}  # type: ignore[var-annotated]
    for file in data.measured_files():
        name = str(Path(file).relative_to(ROOT))
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                # A context is the test and its phase: setup, run or teardown.
                test = context.rpartition("|")[0]
                if test in known:
                    found[test][name].add(line)
    return {test: {file: sorted(lines) for file, lines in files.items()} for test, files in found.items()}
