"""Commands that need no service: run, validate, init, methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabbit_cli.options import (
    Format,
    JobFile,
    Output,
    Overrides,
    Seed,
    load_job,
    print_json,
    print_table,
    quiet_logs,
    read_settings,
)

if TYPE_CHECKING:
    from lorabbit.job.spec import JobSpec
    from lorabbit_cli.local.embedded_run import ComputeOptions, RunResult

CANCELLED = "cancelled"
Workers = Annotated[int | None, typer.Option(min=1, help="Training processes; as many as processors when absent.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(run)
    app.command()(validate)
    app.command()(init)
    app.command()(methods)


def run(  # noqa: PLR0913, PLR0917 - options of the command line
    file: JobFile,
    overrides: Overrides = [],  # noqa: B006 - typer's way to say "may be repeated"
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run's folder is made.")] = Path("runs"),
    seed: Seed = None,
    output: Output = Format.TEXT,
    workers: Workers = None,
) -> None:
    """Run a job here, without any service.

    Server and clients live in this command. The run's folder DIR/<job> gets the adapter (PEFT's format),
    checkpoints, the report and its pages; a second run of the same name goes to DIR/<job>-2, and none is written
    over. A run that cannot begin leaves no folder. The same job and seed give the same adapter, to the byte, here and
    over RabbitMQ. Ctrl-C ends the job cleanly and keeps what there is; a second Ctrl-C ends at once.

    Example: lorabbit run examples/quickstart.yaml --set rounds=5
    """
    spec = load_job(file, overrides, seed)
    ended = _run(spec, out, _compute_options(workers), is_quiet=output is Format.JSON)
    _write_pages(ended.folder)
    if output is Format.JSON:
        print_json({**ended.report.model_dump(mode="json"), "folder": str(ended.folder)})
    else:
        _print_outcome(ended)
    raise typer.Exit(ended.exit_code)


def _compute_options(workers: int | None) -> ComputeOptions:
    """With what to train, as the environment of a client says."""
    from lorabbit.config.settings import ClientSettings  # noqa: PLC0415 - imports are lazy throughout
    from lorabbit_cli.local.embedded_run import ComputeOptions  # noqa: PLC0415

    settings = read_settings(ClientSettings)
    return ComputeOptions(settings.device, settings.threads, settings.data_root, workers)


def _run(spec: JobSpec, out: Path, compute: ComputeOptions, *, is_quiet: bool) -> RunResult:
    """Run the job under a live view."""
    from rich.console import Console  # noqa: PLC0415 - as above

    from lorabbit_cli.formatting import count_text  # noqa: PLC0415
    from lorabbit_cli.live_view.view import LiveView  # noqa: PLC0415
    from lorabbit_cli.local.embedded_run import Callbacks, run_local  # noqa: PLC0415
    from lorabbit_client.execution.null_workspace import is_null  # noqa: PLC0415

    quiet_logs()
    console = Console(stderr=is_quiet)
    what = spec.model.name if is_null(spec.model.name) else f"{spec.model.name} and {spec.data.source}"
    view = LiveView(spec, console=console)

    def loading() -> None:
        console.print(
            f"{spec.name}: loading {what} for {count_text(spec.clients, 'client')}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    try:
        return run_local(spec, out, compute=compute, callbacks=Callbacks(loading, view.start, view.feed))
    finally:
        view.stop()


def _write_pages(folder: Path) -> None:
    """Make the report's pages beside it; a run that is done stays done whatever becomes of them."""
    try:
        from lorabbit_cli.report.pages import write_pages  # noqa: PLC0415 - imports matplotlib

        write_pages(folder)
    except Exception as error:  # noqa: BLE001 - hours of training are worth more than a plot
        why = f"{type(error).__name__}: {error}"
        typer.echo(f"warning: no pages were made ({why}); try again with: lorabbit report {folder}", err=True)


def _print_outcome(ended: RunResult) -> None:
    """Print the summary, and after an interruption what was kept."""
    from lorabbit_cli.report.summary import print_summary  # noqa: PLC0415 - imports rich

    print_summary(ended.report, ended.folder)
    if ended.report.status == CANCELLED:
        typer.echo(f"cancelled: {kept_files(ended.folder)}", err=True)


def kept_files(folder: Path) -> str:
    """Say what a run that was cut short left behind."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    kept = f"the adapter of the last complete round is in {checkpoints[-1]}" if checkpoints else "no round was complete"
    return f"{folder} is kept; {kept}"


def validate(
    file: JobFile,
    overrides: Overrides = [],  # noqa: B006 - as above
    seed: Seed = None,
    output: Output = Format.TEXT,
) -> None:
    """Check a job file and say what it would do.

    Loads the model and splits the data as a run does, so that what is wrong with them shows now, and the bytes
    of a round are known before anything starts.

    Example: lorabbit validate examples/quickstart.yaml
    """
    from lorabbit_cli.local.dry_run import dry_run, lines  # noqa: PLC0415 - as above

    quiet_logs()
    found = dry_run(load_job(file, overrides, seed), _compute_options(workers=None))
    if output is Format.JSON:
        print_json(found.model_dump(mode="json"))
        return
    typer.echo(f"{file} is valid")
    for name, text in lines(found):
        typer.echo(f"  {name + ':':<12}{text}")


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("job.yaml"),
) -> None:
    """Write a job file with every key explained.

    Example: lorabbit init my-job.yaml
    """
    from lorabbit.errors import BadInput  # noqa: PLC0415 - as above
    from lorabbit_cli.job_template import template  # noqa: PLC0415

    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(template(str(file)))
    except FileExistsError:
        raise BadInput(f"{file} exists already; remove it or name another file") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {file}; next: lorabbit validate {file}")


def methods(output: Output = Format.TEXT) -> None:
    """List the federated methods and their settings, and the other words of a job that make a baseline.

    Example: lorabbit methods --format json
    """
    from lorabbit.job.glossary import CHOICES  # noqa: PLC0415 - as above
    from lorabbit.methods.registry import METHODS  # noqa: PLC0415
    from lorabbit_cli.schema_text import field_rows  # noqa: PLC0415

    if output is Format.JSON:
        listed = [
            {"name": m.name, "summary": m.summary, "paper": m.paper, "settings": m.model_json_schema()["properties"]}
            for m in METHODS.values()
        ]
        print_json({"methods": listed, "choices": {key: dict(words) for key, words in CHOICES.items()}})
        return
    print_table(("method", "what it does"), [(m.name, m.summary) for m in METHODS.values()])
    for key, words in CHOICES.items():
        typer.echo()
        print_table((key, "what it is"), list(words.items()))
    for method in METHODS.values():
        typer.echo(f"\n{method.name}\n  {method.paper}")
        for name, kind, default, meaning in field_rows(method):
            typer.echo(f"  method.{name} ({kind}; default {default}): {meaning}".replace("`", ""))
