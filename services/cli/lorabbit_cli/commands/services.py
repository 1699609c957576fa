"""Commands of a deployment: server, client, doctor, version."""

from __future__ import annotations

import typer

from lorabbit_cli.options import Format, Output, print_json, quiet_logs, read_settings


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (server, client, doctor, version):
        app.command()(command)


def server() -> None:
    """Serve jobs until told to stop.

    Settings come from LORABBIT_* variables.

    Example: LORABBIT_BROKER_URL=amqp://guest:guest@broker:5672/ lorabbit server
    """
    from lorabbit.config.settings import ServerSettings  # noqa: PLC0415 - imports are lazy throughout
    from lorabbit_server.__main__ import main  # noqa: PLC0415

    raise typer.Exit(main(read_settings(ServerSettings)))


def client() -> None:
    """Train for a server until told to stop.

    Settings come from LORABBIT_* variables.

    Example: LORABBIT_BROKER_URL=amqp://guest:guest@broker:5672/ lorabbit client
    """
    from lorabbit.config.settings import ClientSettings  # noqa: PLC0415 - as above
    from lorabbit_client.__main__ import main  # noqa: PLC0415

    raise typer.Exit(main(read_settings(ClientSettings)))


def doctor(output: Output = Format.TEXT) -> None:
    """Check what LoRAbbit needs, line by line.

    Each line says pass, or what to do. `lorabbit run` needs none of broker, store and server. Exits with 3
    when broker or store cannot be reached.

    Example: lorabbit doctor
    """
    from lorabbit_cli.doctor import examine, exit_code  # noqa: PLC0415 - as above

    quiet_logs()
    findings = examine()
    if output is Format.JSON:
        print_json([finding.as_json() for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:<5} {finding.what:<11} {finding.text}")
    raise typer.Exit(exit_code(findings))


def version(output: Output = Format.TEXT) -> None:
    """Print the version.

    Example: lorabbit version --format json
    """
    from lorabbit import __version__  # noqa: PLC0415 - as above

    if output is Format.JSON:
        print_json({"lorabbit": __version__})
    else:
        typer.echo(__version__)
