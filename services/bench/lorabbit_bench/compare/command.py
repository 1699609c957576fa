"""The command that compares runs: the same data, partition and seeds for each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabbit_cli.options import Format, Output, Overrides, print_json, quiet_logs

if TYPE_CHECKING:
    from lorabbit_bench.compare.orchestrator import CompareResult

Files = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="One sweep file, or job files that share their data.")
]

Seeds = Annotated[str | None, typer.Option(metavar="N,N,...", help="Seeds of every run, in place of the file's.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the comparison's folder is made.")]
CacheFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where finished runs are kept; DIR/cache of --out when absent.")
]
Only = Annotated[
    list[str], typer.Option(metavar="PATTERN", help="Only runs named CASE/RUN/SEED like this; repeatable.")
]


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(compare)


def compare(  # noqa: PLR0913, PLR0917 - options of the command line
    files: Files,
    overrides: Overrides = [],  # noqa: B006 - typer's way to say "may be repeated"
    seeds: Seeds = None,
    out: Out = Path("comparisons"),
    cache: CacheFolder = None,
    only: Only = [],  # noqa: B006 - as above
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; as many as processors when absent.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again.")] = False,  # noqa: FBT002 - a flag
    no_run: Annotated[bool, typer.Option("--no-run", help="Report what is finished; run nothing.")] = False,  # noqa: FBT002 - a flag
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep each run's final adapter too.")] = False,  # noqa: FBT002 - a flag
    output: Output = Format.TEXT,
) -> None:
    """Compare runs with the same data, partition and seeds.

    Runs what is not yet finished, several runs at once, and writes one report into DIR/<name>: scores, payload,
    compute and time, what a target score took, paired differences from a reference run, as Markdown, CSV, JSON,
    HTML and PNG. A finished run is kept by its content and never repeated; a comparison that was interrupted goes
    on where it stopped. A run that fails is reported and stops no other.

    Example: lorabbit compare examples/sa-fedlora.yaml examples/adalora.yaml --seeds 0,1,2
    """
    from rich.console import Console  # noqa: PLC0415 - imports are lazy throughout

    from lorabbit_bench.compare.orchestrator import CompareOptions, run_comparison  # noqa: PLC0415
    from lorabbit_bench.compare.sweep import read  # noqa: PLC0415

    quiet_logs()
    sweep = read(files, overrides, _seeds(seeds))
    asked = CompareOptions(
        out=out,
        cache=cache or out / "cache",
        command=_command_line(files, overrides, seeds),
        only=tuple(only),
        jobs=jobs,
        fresh=fresh,
        runs=not no_run,
        with_adapter=keep_adapters,
    )
    finished = run_comparison(sweep, asked, Console(stderr=True))
    if output is Format.JSON:
        print_json({**finished.comparison.model_dump(mode="json"), "folder": str(finished.folder)})
    else:
        _say(finished)
    raise typer.Exit(1 if finished.failed else 0)


def _command_line(files: list[str], overrides: list[str], seeds: str | None) -> str:
    """Write the command that makes this comparison again."""
    options = [f"--set={override}" for override in overrides] + ([f"--seeds={seeds}"] if seeds else [])
    return shlex.join(["lorabbit", "compare", *files, *options])


def _seeds(text: str | None) -> list[int] | None:
    """Read --seeds; raises BadInput."""
    from lorabbit.errors import BadInput  # noqa: PLC0415 - as above

    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise BadInput(f"--seeds: {text!r} is no list of whole numbers such as 0,1,2")
    return seeds


def _say(finished: CompareResult) -> None:
    """Print the scores of every case, and where everything else is."""
    from lorabbit_bench.compare.report import case_title, tables  # noqa: PLC0415 - as above
    from lorabbit_cli.options import print_table  # noqa: PLC0415

    for case in finished.comparison.cases:
        if case_title(case):
            typer.echo(f"\n{case_title(case)}")
        scores = tables(finished.comparison, case)[0]
        print_table(scores.headings, list(scores.rows))
    for note in finished.comparison.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"\nreport: {finished.folder / 'report.html'} ({finished.cached} runs were finished before)")
