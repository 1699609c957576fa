"""The command `lorabbit`: every command by name, what it exits with, and nothing imported before it is needed.

Commands live in the modules `commands_*`; whatever is heavier than typer is imported inside them,
because `lorabbit --help` must not take the time that a model takes.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from lorabbit.errors import LoRAbbitError
from lorabbit_cli import (
    commands_access,
    commands_clients,
    commands_compare,
    commands_deployment,
    commands_jobs,
    commands_local,
    commands_results,
    commands_stress,
)

INTERRUPTED = 130
ABOUT = """Federated LoRA fine-tuning over RabbitMQ.

A first run needs no service: lorabbit run examples/quickstart.yaml

Exit codes: 0 done, 1 the run failed or was cancelled, 2 bad input (a job file, a data file, an option),
3 a service cannot be reached (broker, store, server), 4 not allowed (a token, a password, a revoked client),
130 interrupted (Ctrl-C).
"""


class OneSentence(TyperGroup):
    """Turns every error that LoRAbbit raises on purpose into one line and its exit code."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer does not export its context class
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LoRAbbitError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:
            raise  # typer ends quietly when `| head` has had enough
        except OSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=OneSentence,
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _commands in (
    commands_local,
    commands_compare,
    commands_jobs,
    commands_access,
    commands_clients,
    commands_results,
    commands_deployment,
    commands_stress,
):
    _commands.register(app)


def main() -> None:
    """Run the command line."""
    app(prog_name="lorabbit")


if __name__ == "__main__":
    main()
