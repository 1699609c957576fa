"""Play the failure matrix and print it row by row.

    PYTHONPATH=tests python -m chaos [--only NAME ...] [--out FILE]

Ends with 1 when a row failed. Rows that this machine cannot play are printed as such and fail nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from chaos.faults import NotHere
from chaos.play import Theatre, Verdict
from chaos.rows import ROWS, Row

HEAD = ("row", "strikes", "recovery, s", "sha256 equal", "bytes sent twice")


def main() -> int:
    """Play what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", help="these rows")
    parser.add_argument("--out", type=Path, help="keep the table in this file too")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.only or row.name in arguments.only]
    began, failed, lines = time.monotonic(), 0, [line(HEAD), line(["---"] * len(HEAD))]
    print("\n".join(lines), flush=True)
    theatre = Theatre(rows)
    try:
        for row in rows:
            cells, trouble = play(theatre, row)
            lines.append(line(cells))
            print("\n".join([lines[-1], *trouble]), flush=True)
            failed += bool(trouble)
    finally:
        theatre.close()
    print(f"\n{len(rows) - failed} of {len(rows)} rows passed in {time.monotonic() - began:.0f} s")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failed else 0


def play(theatre: Theatre, row: Row) -> tuple[list[str], list[str]]:
    """Play one row; the cells of its line, and what failed."""
    try:
        verdict = theatre.play(row)
    except NotHere as why:
        return [row.name, row.strikes, "-", f"not played: {why}", "-"], []
    except AssertionError as error:
        return [row.name, row.strikes, "-", "no", "-"], [str(error)]
    return cells_of(verdict), verdict.differences


def cells_of(verdict: Verdict) -> list[str]:
    """A row's line."""
    recovery = "-" if verdict.recovery_seconds is None else f"{verdict.recovery_seconds:.1f}"
    same = "yes" if verdict.same_adapter else "no"
    return [verdict.row.name, verdict.row.strikes, recovery, same, str(verdict.sent_twice)]


def line(cells: tuple[str, ...] | list[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
