"""Write the measured figures of README and docs from the stored results of the benchmarks.

    python tools/figures.py

A page marks a figure with a comment that holds a Jinja template. The text up to the closing comment is what the
template renders to, and is replaced by this script:

    takes <!--{{ digits(row(overhead, way="bare loop").seconds, 3) }}-->38.8<!--{}--> seconds

A template sees every file benchmarks/results/NAME.json as `NAME` (`-` becomes `_`), and the stress tests as
`stress_NAME`, and calls the functions of this module. A name or a row that does not exist is an error. Templates use no
`|`, which would divide the cell of a Markdown table.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
STRESS = ROOT / "benchmarks/stress"
FIGURE = re.compile(r"(<!--(\{[{%].*?[%}]\})-->)(.*?)(<!--\{\}-->)", re.DOTALL)
Result = Mapping[str, Any]


def pages() -> list[Path]:
    """Return the pages that may hold figures: README.md, docs and the README of each benchmark."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "benchmarks").rglob("README.md")),
    ]


def results() -> dict[str, Result]:
    """Return every stored result by the name that templates use."""
    found = {path.stem: path for path in RESULTS.glob("*.json")}
    found |= {f"stress_{path.parent.name}": path for path in STRESS.glob("*/stress.json")}
    return {name.replace("-", "_"): json.loads(path.read_bytes()) for name, path in sorted(found.items())}


def digits(value: float, count: int) -> str:
    """Round to a number of significant digits, without an exponent and with a comma between thousands."""
    rounded = float(f"{value:.{count}g}")
    decimals = max(
        0, count - len(str(int(abs(rounded)))) if abs(rounded) >= 1 else len(f"{rounded:.10f}".rstrip("0")) - 2
    )
    return f"{rounded:,.{decimals}f}"


def fixed(value: float, decimals: int) -> str:
    """Round to a number of decimals, with a comma between thousands."""
    return f"{value:,.{decimals}f}"


def row(result: Result, **wanted: object) -> Mapping[str, Any]:
    """Return the one row of a result whose columns have these values."""
    (found,) = [each for each in result["rows"] if all(each[key] == value for key, value in wanted.items())]
    return found  # type: ignore[no-any-return]


def total(rows: Sequence[Mapping[str, float]], column: str) -> float:
    """Return the sum of a column."""
    return sum(each[column] for each in rows)


def interval(rows: Sequence[Mapping[str, float]], column: str) -> tuple[float, float]:
    """Return the mean of a column and half the width of its 95 % confidence interval (Student's t)."""
    values = [each[column] for each in rows]
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def commits(of: Iterable[Result]) -> str:
    """Name the commit and date of each result: `commit 1a2b3c4d5e (2026-12-01)`."""
    named = dict.fromkeys(f"{each['commit']} ({each['date']})" for each in of)
    return f"commit{'s' if len(named) > 1 else ''} {', '.join(named)}"


def source(result: Result) -> str:
    """Name commit and date of a result, the versions of broker and store where it used them, and the machine."""
    facts = {**result.get("machine", {}), **result.get("facts", {})}
    services = [
        f"{title} {facts[key]}" for key, title in (("rabbitmq", "RabbitMQ"), ("redis", "Redis")) if key in facts
    ]
    cores = facts.get("cores", facts.get("processors"))
    return ", ".join([f"commit {result['commit']}", result["date"], *services, f"{cores} cores", facts["memory"]])


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: Rows of a result.
        columns: Title of each column of the table, and the column of the result, followed by `:2` for two significant
            digits or by `:.2` for two decimals.

    Returns:
        The table, with a line break before and after it.
    """
    lines = ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(each, column) for column in columns.values()) + " |" for each in rows]
    return "\n".join([*lines, ""])


def cell(values: Mapping[str, Any], column: str) -> str:
    """Return one cell of a table; a value that is no number is shown as it is."""
    name, _, form = column.partition(":")
    value = values[name]
    if not form or not isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return fixed(value, int(form[1:])) if form.startswith(".") else digits(value, int(form))


def environment() -> Environment:
    """Return the Jinja environment of the templates, which call the functions of this module."""
    made = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701 - Markdown
    for function in (digits, fixed, row, total, interval, commits, source, table):
        made.globals[function.__name__] = function
    return made


def rendered(text: str, stored: Mapping[str, Result]) -> str:
    """Return a page with every figure rendered anew."""
    templates = environment()

    def figure(match: re.Match[str]) -> str:
        opening, template, _, closing = match.groups()
        return opening + templates.from_string(template).render(stored) + closing

    return FIGURE.sub(figure, text)


def main() -> None:
    """Rewrite every page and name those that changed."""
    stored = results()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = rendered(text, stored)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: figures updated", file=sys.stderr)


if __name__ == "__main__":
    main()
