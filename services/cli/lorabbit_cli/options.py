"""Arguments and options that several commands share, and how a command prints what it has to say."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from lorabbit.config.settings import Settings
    from lorabbit.job.spec import JobSpec

    SettingsKind = TypeVar("SettingsKind", bound=Settings)


class Format(StrEnum):
    """How a command prints its answer."""

    TEXT = "text"
    JSON = "json"


JobFile = Annotated[str, typer.Argument(metavar="FILE", help="A job file, YAML or TOML; - reads standard input.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Override a key, such as local.learning_rate=0.001.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Override the job's seed.")]
Output = Annotated[Format, typer.Option("--format", help="text for people, json for programs.")]
ServerUrl = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="The server's address; LORABBIT_SERVER_URL when absent."),
]
ComposeFiles = Annotated[
    list[Path],
    typer.Option("--file", metavar="FILE", help="compose: a compose file; may be repeated, later over earlier."),
]
Job = Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job's name; the newest job when absent.")]


def load_job(file: str, overrides: list[str], seed: int | None) -> JobSpec:
    """Read a job file with the overrides of the command line."""
    from lorabbit import job_loader  # noqa: PLC0415 - imports pydantic

    return job_loader.load(file, overrides, seed=seed)


def read_settings(kind: type[SettingsKind]) -> SettingsKind:
    """Read settings from the environment; raises BadInput naming the variable that cannot be."""
    from lorabbit.config import settings  # noqa: PLC0415 - imports pydantic

    return settings.read_settings(kind)


def quiet_logs() -> None:
    """Log errors only: a command for people says what matters itself."""
    from lorabbit.config.logging import configure  # noqa: PLC0415 - imports structlog

    configure("ERROR", "text")


def print_json(value: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print rows under headings, in columns as wide as they need to be."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def is_run_folder(name: str) -> bool:
    """Tell whether an argument names a run folder on this machine."""
    return (Path(name) / "report.json").is_file()
