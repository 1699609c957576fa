"""Commands about clients: who they are, and how many."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorabbit_cli.commands_jobs import server_at
from lorabbit_cli.options import Format, Output, ServerUrl, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

PoolName = Annotated[str | None, typer.Option("--pool", metavar="POOL", help="A pool of like clients.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (clients,):
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
