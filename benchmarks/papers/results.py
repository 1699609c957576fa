"""Write the tables of a finished sweep into RESULTS.md, and its plots beside it: nothing there is typed by hand.

    python benchmarks/papers/results.py comparisons/sa-fedlora [comparisons/sa-fedlora-tuning ...]

Each comparison fills the part of RESULTS.md between `<!-- NAME -->` and `<!-- end of NAME -->`, NAME being the sweep's,
with what `lorabbit compare` left in its `comparison.json`; wall times come from its cache. A page of docs/methods with
the same marks gets the scores alone. Words around the marks are people's and stay. A comparison without marks in
RESULTS.md is an error.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from lorabbit_bench.compare.plots import pictures
from lorabbit_bench.compare.report import case_title, difference_text, of, score_spread, share_text
from lorabbit_bench.compare.results import CaseResult, Comparison, RunRow
from lorabbit_bench.compare.statistics import Spread
from lorabbit_cli.formatting import bytes_text, duration_text, number_text, score_text

HERE = Path(__file__).resolve().parent
RESULTS, PLOTS = HERE / "RESULTS.md", HERE / "results"
PAGES = HERE.parents[1] / "docs/methods"
DRAWN = ("rounds", "bytes", "modelled seconds")
"""What scores are drawn against, of all that `lorabbit compare` draws."""
COLORS = 48
"""Of a plot's file: enough for lines and bands, a third of the bytes."""
Column = tuple[str, Callable[[RunRow], str]]


def main() -> None:
    """Render every comparison that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a comparison, as compare wrote it")
    parser.add_argument("--cache", type=Path, help="of finished runs; beside the folder when absent")
    options = parser.parse_args()
    text = RESULTS.read_text(encoding="utf-8")
    for folder in options.folders:
        comparison = Comparison.model_validate_json((folder / "comparison.json").read_bytes())
        text = replaced(text, comparison.name, section(comparison, options.cache or folder.parent / "cache"))
        for page in sorted(PAGES.glob("*.md")):
            words = page.read_text(encoding="utf-8")
            if marks(comparison.name)[0] in words:
                page.write_text(replaced(words, comparison.name, scores(comparison)), encoding="utf-8")
    RESULTS.write_text(text, encoding="utf-8")


def marks(name: str) -> tuple[str, str]:
    """What stands before and after the part that is made."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def replaced(text: str, name: str, made: str) -> str:
    """Put a section between its marks."""
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"{RESULTS}: wants the lines {begin} and {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"


def section(comparison: Comparison, cache: Path) -> str:
    """All cases of a comparison that have a finished run, and how long they took."""
    parts = [_how_made(comparison, cache)]
    for case in comparison.cases:
        case.rows = [row for row in case.rows if row.seeds]
        if case.rows:
            title = f"**{case_title(case)}**" if case_title(case) else ""
            parts += [
                title,
                *_tables(comparison, case),
                "" if "tuning" in comparison.name else _plots(comparison, case),
            ]
    return "\n\n".join(part for part in parts if part)


def scores(comparison: Comparison) -> str:
    """Final scores and differences of all cases that have a finished run."""
    parts = []
    for case in comparison.cases:
        rows = [row for row in case.rows if row.seeds]
        columns = _score_columns(case, comparison.reference)
        columns += [("rounds to the target", lambda row: _reached(row, "rounds", lambda number: f"{number:.1f}"))]
        parts += [f"**{case_title(case)}**" if case_title(case) else "", _markdown(columns, rows)] if rows else []
    return "\n\n".join(part for part in parts if part)


def _score_columns(case: CaseResult, reference: str) -> list[Column]:
    """What every table of scores begins with."""
    return [
        ("run", lambda row: row.label),
        ("seeds", lambda row: str(len(row.seeds))),
        (f"final {case.metric}", lambda row: score_spread(row.final)),
        (
            f"less {reference}",
            lambda row: "reference" if row.label == reference else difference_text(row.difference),
        ),
    ]


def _how_made(comparison: Comparison, cache: Path) -> str:
    """Seeds, rounds, versions and wall time, from the runs themselves."""
    keys = {run.key for run in comparison.runs}
    walls = [json.loads((cache / key / "outcome.json").read_bytes())["wall_seconds"] for key in sorted(keys)]
    rounds = sorted({run.rounds for run in comparison.runs})
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items() if version)
    seeds = ", ".join(map(str, sorted({run.seed for run in comparison.runs})))
    length, took = " or ".join(map(str, rounds)), duration_text(sum(walls))
    made = f"{len(keys)} runs of {length} rounds, seeds {seeds}; {took} of wall time in all, one run at a time."
    return f"{made} {versions}."


def _tables(comparison: Comparison, case: CaseResult) -> Iterable[str]:
    """Scores with what was sent for them, and what the target took."""
    reference = comparison.reference
    first: list[Column] = [
        *_score_columns(case, reference),
        ("numbers sent", lambda row: of(row.parameters_up, number_text)),
        (f"of {reference}'s", lambda row: _share_of(row, case, reference)),
        ("payload, both ways", _payload),
        ("operations", lambda row: of(row.flops, number_text)),
    ]
    yield _markdown(first, case.rows)
    if case.target is None:
        return
    second: list[Column] = [
        ("run", lambda row: row.label),
        ("reached", lambda row: f"{row.to_target.seeds}/{row.to_target.of}" if row.to_target else "-"),
        ("rounds", lambda row: _reached(row, "rounds", lambda number: f"{number:.1f}")),
        ("payload", lambda row: _reached(row, "bytes", bytes_text)),
        ("operations", lambda row: _reached(row, "flops", number_text)),
    ]
    if comparison.link is not None:
        second += [
            ("modelled time", lambda row: _reached(row, "modelled_seconds", duration_text)),
            (f"of {reference}'s", lambda row: share_text(row.to_target.seconds_share if row.to_target else None)),
        ]
    yield f"To {case.metric} {score_text(case.target)}, means over the seeds that reached it:"
    yield _markdown(second, case.rows)


def _share_of(row: RunRow, case: CaseResult, reference: str) -> str:
    whole = next((other.parameters_up for other in case.rows if other.label == reference), None)
    if row.parameters_up is None or whole is None:
        return "-"
    return f"{100 * row.parameters_up.mean / whole.mean:.2f} %"


def _payload(row: RunRow) -> str:
    return bytes_text(row.bytes_up.mean + row.bytes_down.mean) if row.bytes_up and row.bytes_down else "-"


def _reached(row: RunRow, what: str, text: Callable[[float], str]) -> str:
    found: Spread | None = getattr(row.to_target, what, None)
    return of(found, text)


def _plots(comparison: Comparison, case: CaseResult) -> str:
    """Draw what is shown, and refer to it."""
    PLOTS.mkdir(exist_ok=True)
    shown = []
    for name, png in pictures(case).items():
        if name in DRAWN:
            file = f"{comparison.name}-{case.name}-{name.replace(' ', '-')}.png"
            Image.open(io.BytesIO(png)).quantize(COLORS).save(PLOTS / file, optimize=True)
            shown.append(f"![{case.metric} against {name}](results/{file})")
    return "\n".join(shown)


def _markdown(columns: Sequence[Column], rows: Sequence[RunRow]) -> str:
    """A table; figures to the right."""
    lines = [[title for title, _ in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
