"""Summary: what a person reads when a run is over: what came of it, where it lies, what to do next."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorabbit.report import Report
from lorabbit_cli import facts
from lorabbit_cli.units import bytes_text, count_text, duration_text, score_text

STYLES = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "yellow"}


def print_summary(report: Report, folder: Path, *, console: Console | None = None) -> None:
    """Print how a run ended: a panel on a terminal, plain lines elsewhere."""
    console = console or Console()
    rows = summary_rows(report, folder)
    commands = next_commands(report, folder)
    if not console.is_terminal:
        for name, value in [*rows, *(("next", command) for command in commands)]:
            console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value))
    style = STYLES[report.status]
    title = Text.assemble((report.job, "bold"), "  ", (report.status, f"bold {style}"))
    body = Group(grid, "", *(Text(f"  {command}", "cyan") for command in commands)) if commands else grid
    console.print(Panel(body, title=title, title_align="left", border_style=style, box=box.ROUNDED))


def summary_rows(report: Report, folder: Path) -> list[tuple[str, str]]:
    """Name and value of every line, in order."""
    known = facts.of_report(report)
    rows = [("status", f"{report.status}{f': {report.reason}' if report.reason else ''}")]
    clients = count_text(len(report.clients), "client")
    rounds = count_text(len(report.rounds), "round")
    rows.append(("run", f"{rounds} with {clients} in {duration_text(report.seconds)}"))
    if known.final is not None:
        best = f", best {score_text(known.best)} in round {known.best_round}" if known.best is not None else ""
        rows.append((known.main_metric, f"{score_text(known.first)} -> {score_text(known.final)}{best}"))
    overhead = bytes_text(known.overhead_up + known.overhead_down)
    rows.append(
        ("payload", f"{bytes_text(known.bytes_up)} up, {bytes_text(known.bytes_down)} down (and {overhead} overhead)")
    )
    if known.base_sync:
        rows.append(("base_sync", f"{bytes_text(known.base_sync)} of the payload down are base models"))
    if known.rejected:
        rows.append(("refused", ", ".join(f"{number} {reason}" for reason, number in known.rejected.items())))
    if known.privacy is not None:
        rows.append(("privacy", known.privacy.sentence))
    rows += [("set aside", reason) for reason in report.set_aside.values()]
    if (folder / "adapter").is_dir():
        size = f"{report.adapter.parameters:,} parameters, {bytes_text(report.adapter.bytes)}"
        rows.append(("adapter", f"{folder / 'adapter'} ({size})"))
        rows.append(("sha256", report.adapter.sha256))
    page = folder / "report.html"
    rows.append(("report", str(page if page.is_file() else folder / "report.json")))
    return rows


def next_commands(report: Report, folder: Path) -> list[str]:
    """Commands that make sense now."""
    if not (folder / "adapter").is_dir() or report.status == "failed":
        return []
    commands = [f"lorabbit export {folder} --out {report.job}-adapter"]
    if (folder / "tensorboard").is_dir() and shutil.which("tensorboard"):
        commands.append(f"tensorboard --logdir {folder / 'tensorboard'}")
    return commands
