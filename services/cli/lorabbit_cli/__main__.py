"""The command `lorabbit`: every command by name, what it exits with, and nothing imported before it is needed.

Commands live in `lorabbit_cli.commands`. Other packages add theirs through the entry point group
`lorabbit.commands`, whose entries are functions that take the typer application. Modules heavier than typer are
imported inside the commands, so that `lorabbit --help` stays fast.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from lorabbit.errors import LoRAbbitError
from lorabbit_cli.commands import access, clients, jobs, local, results, services

INTERRUPTED = 130
ABOUT = """Federated LoRA fine-tuning over RabbitMQ.

A first run needs no service: lorabbit run examples/quickstart.yaml

Exit codes: 0 done, 1 the run failed or was cancelled, 2 bad input (a job file, a data file, an option),
3 a service cannot be reached (broker, store, server), 4 not allowed (a token, a password, a revoked client),
130 interrupted (Ctrl-C).
"""


class ErrorReportingGroup(TyperGroup):
    """Turns every error that LoRAbbit raises on purpose into one line and its exit code."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer does not export its context class
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LoRAbbitError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("lorabbit"):
                raise
            typer.echo(f"error: this command needs the package {error.name}: pip install 'lorabbit[all]'", err=True)
            raise typer.Exit(1) from error
        except BrokenPipeError:
            raise  # typer ends quietly when `| head` has had enough
        except OSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=ErrorReportingGroup,
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _commands in (local, jobs, access, clients, results, services):
    _commands.register(app)
for _entry_point in entry_points(group="lorabbit.commands"):
    _entry_point.load()(app)


def main() -> None:
    """Run the command line."""
    app(prog_name="lorabbit")


if __name__ == "__main__":
    main()
