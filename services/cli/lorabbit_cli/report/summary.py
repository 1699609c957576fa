"""Summary of a report: what the terminal and the pages show of a finished run.

Everything comes from the report itself; nothing is measured again.

Summary: what a person reads when a run is over: what came of it, where it lies, what to do next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorabbit.events.report import Report, Round
from lorabbit.metrics import is_better
from lorabbit.types import BASE
from lorabbit_cli.formatting import bytes_text, count_text, duration_text, score_text


@dataclass(slots=True)
class ClientTotal:
    """One client over the whole run; scores are of the last round that has them."""

    client: str
    rounds: int = 0
    examples: int = 0
    loss: float | None = None
    score: float | None = None
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    labels: int = 0
    notes: list[str] = field(default_factory=list)
    """What its privacy has cost so far, what a defense did to it, why it was set aside."""


@dataclass(frozen=True, slots=True)
class PrivacyCost:
    """What a private job has cost its clients by its last round."""

    delta: float
    epsilon: dict[str, float]
    spent: list[str]
    """Clients whose budget bears no further round."""

    @property
    def sentence(self) -> str:
        """The largest epsilon, and how many clients have spent their budget."""
        most = max(self.epsilon, key=lambda client: self.epsilon[client])
        over = f"; {len(self.spent)} of {len(self.epsilon)} have spent their budget" if self.spent else ""
        return f"epsilon is {self.epsilon[most]:.3g} at most ({most}), at delta {self.delta:g}{over}"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Totals of a report."""

    main_metric: str
    first: float | None
    final: float | None
    best: float | None
    best_round: int
    bytes_up: int
    bytes_down: int
    overhead_up: int
    overhead_down: int
    rejected: dict[str, int]
    accepted: int
    bytes_by_role: dict[str, int] = field(default_factory=dict)
    """Of the payload down, by role; preparation included, as in every sum of bytes."""
    told: list[str] = field(default_factory=list)
    """Names of the numbers that the method tells of its rounds."""
    clients: list[ClientTotal] = field(default_factory=list)
    privacy: PrivacyCost | None = None

    @property
    def has_notes(self) -> bool:
        """Tell whether there is anything to note of a client."""
        return any(client.notes for client in self.clients)

    @property
    def base_sync(self) -> int:
        """Bytes of base models that the job made, on their way to clients."""
        return self.bytes_by_role.get(BASE, 0)

    @property
    def change(self) -> float | None:
        """Final less first score."""
        return None if self.first is None or self.final is None else self.final - self.first

    @property
    def improved(self) -> bool:
        """Tell whether the score moved the right way."""
        if self.first is None or self.final is None:
            return False
        return is_better(self.main_metric, self.final, self.first)


def summarize(report: Report) -> RunSummary:
    """Add up a report."""
    metric = report.main_metric or "loss"
    scores = [row.metrics[metric] for row in report.rounds if metric in row.metrics]
    rejected: dict[str, int] = {}
    rows = with_preparation(report)
    for row in rows:
        for reason, number in row.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + number
    return RunSummary(
        main_metric=metric,
        first=scores[0] if scores else None,
        final=report.final.metrics.get(metric, scores[-1] if scores else None),
        best=report.best.metrics.get(metric),
        best_round=report.best.round,
        bytes_up=sum(row.bytes_up for row in rows),
        bytes_down=sum(row.bytes_down for row in rows),
        overhead_up=sum(row.overhead_up for row in rows),
        overhead_down=sum(row.overhead_down for row in rows),
        rejected=rejected,
        accepted=sum(row.accepted for row in report.rounds),
        bytes_by_role=dict(sorted(report.bytes_by_role.items())),
        told=_numbers(report),
        clients=_clients(report, metric),
        privacy=_privacy(report),
    )


def with_preparation(report: Report) -> list[Round]:
    """Every round, the preparation first where there was one."""
    return [*([report.preparation] if report.preparation else []), *report.rounds]


def _numbers(report: Report) -> list[str]:
    """Names of the facts that are numbers in every round that has them, in order of appearance."""
    names: dict[str, bool] = {}
    for row in report.rounds:
        for name, fact in row.facts.items():
            names[name] = names.get(name, True) and isinstance(fact, int | float)
    return [name for name, is_number in names.items() if is_number]


def _clients(report: Report, metric: str) -> list[ClientTotal]:
    """Every client's totals, in the population's order."""
    totals = {client: ClientTotal(client) for client in report.clients}
    for row in with_preparation(report):
        for part in row.per_client:
            total = totals.setdefault(part.client, ClientTotal(part.client))
            total.rounds += 1 if row.round and (part.steps or part.loss is not None) else 0
            total.examples = part.num_examples or total.examples
            total.loss = part.loss if part.loss is not None else total.loss
            total.score = part.metrics.get(metric, total.score)
            total.seconds += part.seconds
            total.bytes_up += part.bytes_up
            total.bytes_down += part.bytes_down
    for client, counts in report.label_counts.items():
        if client in totals:
            totals[client].labels = sum(1 for number in counts.values() if number)
    for client, note in _notes(report):
        if client in totals:
            totals[client].notes.append(note)
    return list(totals.values())


def _privacy(report: Report) -> PrivacyCost | None:
    """What the last round that tells of it says of privacy; None where nobody has spent anything."""
    for row in reversed(report.rounds):
        told = row.facts.get("privacy")
        if isinstance(told, dict) and told.get("epsilon"):
            return TypeAdapter(PrivacyCost).validate_python(
                {name: told[name] for name in ("delta", "epsilon", "spent")}
            )
    return None


def _notes(report: Report) -> Iterator[tuple[str, str]]:
    """What there is to say of single clients."""
    privacy = _privacy(report)
    if privacy is not None:
        for client, epsilon in privacy.epsilon.items():
            yield client, f"epsilon {epsilon:.3g}{', spent' if client in privacy.spent else ''}"
    for client, counts in report.guarded.items():
        yield client, ", ".join(f"{what.replace('_', ' ')} in {number} rounds" for what, number in counts.items())
    for client, reason in report.set_aside.items():
        yield client, f"set aside: {reason}"


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
    known = summarize(report)
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
