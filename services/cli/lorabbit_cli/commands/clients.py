"""Commands about clients: who they are, and how many."""

from __future__ import annotations

import re
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorabbit.errors import BadInput
from lorabbit_cli.commands.jobs import server_at
from lorabbit_cli.options import ComposeFiles, Format, Output, ServerUrl, print_json, print_table, quiet_logs
from lorabbit_cli.scaling.targets import ScaleTarget, TargetOptions, open_scaler

if TYPE_CHECKING:
    from collections.abc import Sequence

PoolName = Annotated[str | None, typer.Option("--pool", metavar="POOL", help="A pool of like clients.")]
POOL_NAME = re.compile(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?")
_DEFAULT = TargetOptions()


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (clients, scale):
        app.command()(command)


def clients(pool: PoolName = None, output: Output = Format.TEXT, url: ServerUrl = None) -> None:
    """List the clients that the server knows, with pool, device, state and when each was last heard of.

    With --pool, those of one pool. A client that has left or is lost stays on the list: its identity is kept for it.

    Example: lorabbit clients --format json
    """
    with server_at(url) as server:
        listed = [entry for entry in server.clients() if pool is None or entry["pool"] == pool]
    if output is Format.JSON:
        print_json(listed)
        return
    if not listed:
        typer.echo(f"no client of pool {pool!r} was ever here" if pool else "no client was ever here")
        return
    now_ms = time.time_ns() // 1_000_000
    print_table(("client", "pool", "device", "state", "last seen", "tags"), [_row(entry, now_ms) for entry in listed])
    typer.echo(_count(listed))


def scale(  # noqa: PLR0913, PLR0917 - each an option of the command
    number: Annotated[int, typer.Argument(metavar="N", min=0, max=100_000, help="How many clients there are to be.")],
    on: Annotated[ScaleTarget, typer.Option("--on", help="What runs the clients.")],
    pool: Annotated[str, typer.Option("--pool", metavar="POOL", help="The pool of like clients.")] = "client",
    batch: Annotated[int, typer.Option(min=1, metavar="B", help="Clients that start at once.")] = 10,
    patience: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="For a batch to be ready.")] = 300.0,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="processes: holds the clients' folders.")
    ] = _DEFAULT.folder,
    image: Annotated[str, typer.Option(help="docker: the client's image.")] = _DEFAULT.image,
    network: Annotated[str, typer.Option(help="docker: the network on which the broker is.")] = _DEFAULT.network,
    memory: Annotated[str, typer.Option(help="docker: memory limit of a client.")] = _DEFAULT.memory,
    file: ComposeFiles = list(_DEFAULT.files),  # noqa: B006 - typer's way to say "may be repeated"
    project: Annotated[str | None, typer.Option(help="compose: the project; the file's name when absent.")] = None,
    namespace: Annotated[str | None, typer.Option(help="kubernetes: the kubeconfig's when absent.")] = None,
    release: Annotated[str | None, typer.Option(help="kubernetes: where several have such a pool.")] = None,
    context: Annotated[str | None, typer.Option(help="kubernetes: of the kubeconfig.")] = None,
    output: Output = Format.TEXT,
) -> None:
    """Bring a pool to N clients, and wait until they are ready or gone.

    Up in batches, each ready before the next; down at once: a client that leaves finishes its task or hands it
    back, so a running job loses nothing. Processes and containers take their settings from this command's
    LORABBIT_* variables.

    Example: lorabbit scale 12 --on compose
    """
    from lorabbit_cli.scaling.base import RolloutPolicy  # noqa: PLC0415 - imports are lazy throughout
    from lorabbit_cli.scaling.base import scale as resize_to  # noqa: PLC0415

    if not POOL_NAME.fullmatch(pool):
        raise BadInput(f"--pool: {pool!r} is no name; small letters, digits and dashes, a letter first")
    quiet_logs()
    options = TargetOptions(folder, image, network, memory, tuple(file), project, namespace, release, context)
    with closing(open_scaler(on, options)) as scaler:
        done = resize_to(
            scaler, pool, number, pace=RolloutPolicy(batch, patience), tell=lambda line: typer.echo(line, err=True)
        )
    if output is Format.JSON:
        print_json(
            {
                "pool": pool,
                "on": str(on),
                "before": done.before,
                "clients": done.after,
                "seconds": round(done.seconds, 3),
            }
        )
    else:
        typer.echo(f"pool {pool} has {done.after} clients (it had {done.before}); next: lorabbit clients --pool {pool}")


def _row(entry: dict[str, Any], now_ms: int) -> tuple[str, ...]:
    """Write one client as cells."""
    tags = ",".join(entry["tags"])
    return (
        entry["client"],
        entry["pool"] or "-",
        entry["device"],
        entry["state"],
        _ago(entry["seen_ms"], now_ms),
        tags,
    )


def _ago(seen_ms: int | None, now_ms: int) -> str:
    """Write how long ago a moment was; the server's clock and this one's may differ a little."""
    if seen_ms is None:
        return "-"
    seconds = max(0, now_ms - seen_ms) // 1000
    if seconds < 120:  # noqa: PLR2004 - two minutes
        return f"{seconds} s ago"
    return f"{seconds // 60} min ago" if seconds < 7200 else f"{seconds // 3600} h ago"  # noqa: PLR2004 - two hours


def _count(listed: Sequence[dict[str, Any]]) -> str:
    """Sum up."""
    return f"{sum(bool(entry['present']) for entry in listed)} of {len(listed)} are here"
