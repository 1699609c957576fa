"""Commands that let clients in and send them away: token, tokens, revoke, certificates."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from lorabbit_cli.commands.jobs import server_at
from lorabbit_cli.options import Format, Output, ServerUrl, print_json, print_table

HOUR = 3600.0


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (token, tokens, revoke, certificates):
        app.command()(command)


def token(
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="NAME", help="The only client that may use it; it may join again with it."),
    ] = None,
    uses: Annotated[int, typer.Option("--uses", metavar="N", help="How many clients may join with it.")] = 1,
    hours: Annotated[float, typer.Option("--hours", metavar="N", help="How long it can be used.")] = 1.0,
    output: Output = Format.TEXT,
    url: ServerUrl = None,
) -> None:
    """Make a join token, with which a client gets a RabbitMQ user of its own.

    It is shown once and kept nowhere. Give it to the client as LORABBIT_JOIN_TOKEN.

    Example: lorabbit token --client hospital-a --hours 24
    """
    from pydantic import ValidationError  # noqa: PLC0415 - imports are lazy throughout

    from lorabbit.config.enrollment import JoinTokenRequest  # noqa: PLC0415 - as above
    from lorabbit.errors import BadInput  # noqa: PLC0415 - as above

    try:
        wish = JoinTokenRequest(client=client, uses=uses, seconds=hours * HOUR)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = {"seconds": "hours"}.get(str(first["loc"][0]), str(first["loc"][0]))
        raise BadInput(f"--{option}: {first['msg']}") from None
    with server_at(url) as server:
        made = server.make_token(wish)
    if output is Format.JSON:
        print_json(made)
    else:
        typer.echo(made["token"])


def tokens(output: Output = Format.TEXT, url: ServerUrl = None) -> None:
    """List the join tokens that can still be used, without their secrets.

    Example: lorabbit tokens
    """
    with server_at(url) as server:
        listed = server.tokens()
    if output is Format.JSON:
        print_json(listed)
        return
    if not listed:
        typer.echo("no join token can be used; make one with: lorabbit token")
        return
    rows: list[tuple[str, ...]] = [
        (str(each["id"]), str(each["client"] or "any"), str(each["uses_left"]), _when(int(each["expires_ms"])))
        for each in listed
    ]
    print_table(("TOKEN", "CLIENT", "USES LEFT", "EXPIRES"), rows)


def revoke(
    client: Annotated[str | None, typer.Argument(metavar="[CLIENT]", help="A client that has joined.")] = None,
    token: Annotated[
        str | None, typer.Option("--token", metavar="TOKEN", help="A join token, as lorabbit tokens names it.")
    ] = None,
    url: ServerUrl = None,
) -> None:
    """Send a client away, or make a join token worthless.

    The client's RabbitMQ user is deleted and its connections are closed; its process ends with exit code 4. It can
    join again only with a token that is made for it by name.

    Example: lorabbit revoke hospital-a
    """
    from lorabbit.errors import BadInput  # noqa: PLC0415 - as above

    if (client is None) == (token is None):
        raise BadInput("name either a client or, with --token, a join token")
    with server_at(url) as server:
        if token is not None:
            server.drop_token(token)
            typer.echo(f"token {token} is worthless now")
        elif client is not None:
            usable = server.revoke(client)["tokens"]
            left = f"; join tokens that can still be used: {', '.join(usable)}" if usable else ""
            typer.echo(f"{client} is revoked{left}")


def certificates(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made where it is missing; must be empty.")],
    host: Annotated[
        list[str], typer.Option("--host", metavar="NAME", help="Another name or address of a service.")
    ] = [],  # noqa: B006 - typer's way to say "may be repeated"
) -> None:
    """Make an authority and certificates for development: ca.pem, and NAME.pem with NAME.key for each service.

    For one machine or a test network; its keys lie beside the certificates. The services are rabbitmq, redis and
    server, each also good for localhost and for every --host; client is a certificate for services that ask for one.

    Example: lorabbit certificates certificates --host broker.example.org
    """
    from lorabbit_cli.certificates import make  # noqa: PLC0415 - as above

    for path in make(folder, host):
        typer.echo(str(path))


def _when(at_ms: int) -> str:
    """A moment, to the minute."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
