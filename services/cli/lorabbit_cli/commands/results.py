"""Commands about what a run made: report, export, replay."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from lorabbit.config.settings import variable
from lorabbit_cli.commands.jobs import server_at
from lorabbit_cli.options import Format, Output, ServerUrl, is_run_folder, print_json

REPORT_FILES = ("report.json", "rounds.jsonl", "job.yaml")
Source = Annotated[str, typer.Argument(metavar="JOB", help="A job's name on the server, or a run's folder.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(report)
    app.command()(export)
    app.command()(replay)


def report(
    source: Source,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the folder with a server's report and its pages is made.")
    ] = Path("runs"),
    output: Output = Format.TEXT,
    url: ServerUrl = None,
) -> None:
    """Print a run's summary and write its pages.

    The pages are report.md, report.html and TensorBoard events. A job on a server is fetched into DIR/<job>; a
    run's folder gets its pages anew. With --format json, the report is printed as it is now, and nothing is
    written.

    Example: lorabbit report quickstart --out reports
    """
    from lorabbit_cli.report.pages import read_report, write_pages  # noqa: PLC0415 - imports are lazy throughout
    from lorabbit_cli.report.summary import print_summary  # noqa: PLC0415

    folder = Path(source) if is_run_folder(source) else out / source
    if not is_run_folder(source):
        with server_at(url) as server:
            if output is Format.JSON:
                print_json(server.report(source).model_dump(mode="json"))
                return
            fetched = server.report(source)
            if not _is_kept_by_the_server(folder):
                server.fetch(source, folder, below=REPORT_FILES)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "report.json").write_text(fetched.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if output is Format.JSON:
        print_json(read_report(folder).model_dump(mode="json"))
        return
    write_pages(folder)
    print_summary(read_report(folder), folder)


def _is_kept_by_the_server(folder: Path) -> bool:
    """Tell whether a run folder is the one that the server itself writes, as for commands in its container."""
    own = variable("LORABBIT_FOLDER")
    kept = own is not None and (Path(own) / "runs" / folder.name).resolve() == folder.resolve()
    return kept and is_run_folder(str(folder))


def export(  # noqa: PLR0913, PLR0917 - options of the command line
    source: Source,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; it must not exist.")],
    which: Annotated[str, typer.Option(help="adapter (the last one), best, or checkpoint-<round>.")] = "adapter",
    merged: Annotated[bool, typer.Option("--merged", help="Write the base model with the adapter merged in.")] = False,  # noqa: FBT002 - a flag
    output: Output = Format.TEXT,
    url: ServerUrl = None,
) -> None:
    """Write an adapter for PEFT, or merged into its base model.

    Example: lorabbit export runs/quickstart --out my-adapter
    """
    from lorabbit_cli.local import export as exports  # noqa: PLC0415 - as above

    if is_run_folder(source):
        made = exports.export(Path(source), out, merged=merged, which=which)
    else:
        with server_at(url) as server, TemporaryDirectory() as scratch:
            server.fetch(source, Path(scratch) / source, below=("report.json", "job.yaml", f"{which}/"))
            made = exports.export(Path(scratch) / source, out, merged=merged, which=which)
    if output is Format.JSON:
        print_json({"folder": str(made), "files": [*sorted(path.name for path in made.iterdir())]})
    else:
        typer.echo(f"wrote {made} ({', '.join(sorted(path.name for path in made.iterdir()))})")


def replay(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, made with output.keep_updates.")],
    output: Output = Format.TEXT,
) -> None:
    """Make a run's versions again from the updates it kept, and compare them to the bit.

    Nothing is trained. The exit code is 1 where a version differs.

    Example: lorabbit replay runs/buffered
    """
    from dataclasses import asdict  # noqa: PLC0415 - as above

    from lorabbit_cli.local import replay as replays  # noqa: PLC0415 - as above

    versions = []
    for version in replays.replay(folder):
        versions.append(version)
        if output is Format.TEXT:
            said = "same" if version.is_same else f"differs: the run made {version.expected}"
            typer.echo(f"round {version.round}: {version.updates} updates, sha256 {version.sha256}, {said}")
    if output is Format.JSON:
        print_json([{**asdict(version), "same": version.is_same} for version in versions])
    if not all(version.is_same for version in versions):
        raise typer.Exit(1)
