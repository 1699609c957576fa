"""Test a sample of mutants and print the scores; see the package's docstring.

PYTHONPATH=tests python -m mutations [--sample N] [--seed N] [--workers N] [--only ID ...] [--record [FILE ...]]
"""

from __future__ import annotations

import argparse
import queue
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tree import PACKAGES, ROOT

from mutations import outcomes
from mutations.coverage_map import FOLDER, MARKERS, SUITES, CoverageMap, record
from mutations.outcomes import Result
from mutations.sampling import Mutant, sample
from mutations.trial import Workspace, temporary_folder

SAMPLE, SEED = 240, 1
MAP = FOLDER / "coverage.json"


def main() -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=SAMPLE, help=f"number of mutants ({SAMPLE})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the sample ({SEED})")
    parser.add_argument("--workers", type=int, default=1, help="mutants that are tested at the same time (1)")
    parser.add_argument("--only", nargs="+", metavar="ID", help="test these mutants again")
    parser.add_argument("--record", nargs="*", metavar="FILE", help="record the coverage map, or that of test files")
    arguments = parser.parse_args()
    if arguments.record is not None or not MAP.exists():
        recorded(arguments.record or [])
    mutants, operators = sample(arguments.sample, arguments.seed)
    equal = outcomes.equivalents()
    print(f"{len(mutants)} mutants of {len(operators)} operators", flush=True)
    run([mutant for mutant in mutants if mutant.id not in equal], arguments.workers, arguments.only)
    outcomes.compact()
    return report(mutants, equal)


def recorded(tests: Sequence[str]) -> None:
    """Record the coverage map, or the part of some test files."""
    newer = record(tests or SUITES)
    if tests and MAP.exists():
        whole = CoverageMap.load(MAP)
        whole.merge(newer)
        newer = whole
    newer.save(MAP)


def run(mutants: Sequence[Mutant], workers: int, only: Sequence[str] | None) -> None:
    """Test the mutants that have no current outcome, and store theirs."""
    coverage = CoverageMap.load(MAP)
    covering = {each.id: coverage.covering(each, (ROOT / each.file).read_text(encoding="utf-8")) for each in mutants}
    stored = outcomes.load()
    due = [each for each in mutants if not outcomes.is_current(stored.get(each.id), covering[each.id])]
    if only:
        due = [each for each in mutants if each.id in only]
    if not due:
        return
    folder = temporary_folder()
    try:
        first, *others = [workspace(folder / str(number)) for number in range(workers)]
        usable = known_tests(first, coverage.seconds)
        while due:
            judge_all(due, covering, usable, coverage.seconds, [first, *others])
            stored = outcomes.load()
            killing = {stored[each.id].test for each in due} & usable
            # A test that fails in the copy without a mutant has killed nothing.
            usable -= (unfit := first.failing(list(killing)))
            due = [each for each in due if stored[each.id].test in unfit]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def workspace(folder: Path) -> Workspace:
    """Copy the repository, and check that its packages are imported from the copy."""
    made = Workspace(folder, [str(package.parent.relative_to(ROOT)) for package in PACKAGES.values()])
    made.verify(["lorabbit.types", "lorabbit_server.engine", "lorabbit_client", "lorabbit_cli"])
    return made


def judge_all(
    mutants: Sequence[Mutant],
    covering: Mapping[str, Sequence[str]],
    usable: Collection[str],
    seconds: Mapping[str, float],
    workspaces: Sequence[Workspace],
) -> None:
    """Test mutants in workspaces that work side by side, and store each outcome."""
    free: queue.Queue[Workspace] = queue.Queue()
    for each in workspaces:
        free.put(each)

    def judged(mutant: Mutant) -> Result:
        space, began = free.get(), time.monotonic()
        try:
            tests = [test for test in covering[mutant.id] if test in usable]
            verdict = space.judge(mutant.file, mutant.source, tests, seconds)
        finally:
            free.put(space)
        return Result(
            **{name: getattr(mutant, name) for name in ("id", "area", "file", "line", "operator", "diff")},
            outcome=verdict.outcome,
            test=verdict.test,
            seconds=round(time.monotonic() - began, 1),
            tests=outcomes.digest(verdict.outcome, verdict.test, covering[mutant.id]),
        )

    with ThreadPoolExecutor(len(workspaces)) as pool:
        for number, done in enumerate(as_completed([pool.submit(judged, each) for each in mutants]), 1):
            result = done.result()
            outcomes.append(result)
            told = f"{result.id} {result.outcome:8} {result.file}:{result.line} {result.test}"
            print(f"[{number}/{len(mutants)}] {told}", flush=True)


def known_tests(space: Workspace, recorded: Collection[str]) -> set[str]:
    """Return the recorded tests that still exist, and tell about files with tests that are not recorded."""
    found = space.collect(["-m", MARKERS, *SUITES])
    if new := {test.split("::", maxsplit=1)[0] for test in found.difference(recorded)}:
        print(f"not every test is in the coverage map (failed, skipped or new): {', '.join(sorted(new))}", flush=True)
    return found.intersection(recorded)


def report(mutants: Sequence[Mutant], equal: Mapping[str, str]) -> int:
    """Print the survivors and the scores; the exit code."""
    results = outcomes.load()
    for mutant in mutants:
        if mutant.id not in equal and results[mutant.id].outcome == outcomes.SURVIVED:
            print(f"\nsurvived: {mutant.id} {mutant.file}:{mutant.line} {mutant.operator}\n{mutant.diff}")
    if unused := equal.keys() - {mutant.id for mutant in mutants}:
        print(f"\nlisted as equivalent, but not in this sample: {', '.join(sorted(unused))}")
    lines, total = outcomes.table(mutants, results, equal)
    print(f"\n{lines}")
    return 0 if total >= outcomes.MINIMUM else 1


if __name__ == "__main__":
    sys.exit(main())
