"""Commands that speak to a server: submit, jobs, status, why, watch, cancel.

Waiting: a server's waits as sentences for people, with times told from the server's own clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from lorabbit_cli.options import (
    Format,
    Job,
    JobFile,
    Output,
    Overrides,
    Seed,
    ServerUrl,
    load_job,
    print_json,
    print_table,
    read_settings,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorabbit.events.job_events import JobEnded
    from lorabbit_cli.api_client import ApiClient

SHOWN = 10
"""Waits that `lorabbit status` shows; `lorabbit why` shows all."""
STUCK_MS = 60_000
"""Progress that is older than this is told with its age."""
MINUTE, HOUR, DAY = 60, 3600, 86_400


def sentence(wait: Mapping[str, Any], now_ms: int) -> str:
    """One wait: the reason, how far it is, when its owner was heard of, since when, until when."""
    parts = [str(wait["reason"])]
    if wait["fraction"] is not None:
        parts.append(f"{100 * wait['fraction']:.0f} % done")
    if now_ms - (wait["moved_ms"] or now_ms) >= STUCK_MS:
        parts.append(f"no progress for {span_text(now_ms - wait['moved_ms'])}")
    if wait["seen_ms"]:
        parts.append(f"last seen {span_text(now_ms - wait['seen_ms'])} ago")
    if wait["since_ms"]:
        parts.append(f"for {span_text(now_ms - wait['since_ms'])}")
    if wait["deadline_ms"] is not None:
        parts.append(f"deadline in {span_text(wait['deadline_ms'] - now_ms)}")
    return ", ".join(parts)


def shorter(found: Mapping[str, Any]) -> Iterator[str]:
    """The first waits of a status, a line each, and what the server that answered is."""
    waits = found["waits"]
    yield from (sentence(wait, found["now_ms"]) for wait in waits[:SHOWN])
    if len(waits) > SHOWN:
        yield f"and {len(waits) - SHOWN} more: lorabbit why {found['job']}"
    if waits:
        yield found["server"]


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Every wait of a status with what ends it, or why the job is over."""
    if not found["waits"]:
        reason = f": {found['reason']}" if found["reason"] else ""
        yield f"job {found['job']} is {found['status']}{reason}; it waits for nobody"
        return
    for wait in found["waits"]:
        yield sentence(wait, found["now_ms"])
        yield f"    {wait['ends']}"
    yield found["server"]


def span_text(milliseconds: int) -> str:
    """Write a span of time in the two largest units at most: 4 s, 2 min, 1 h 5 min, 3 d 2 h."""
    seconds = max(0, round(milliseconds / 1000))
    for unit, size, smaller, part in (("d", DAY, "h", HOUR), ("h", HOUR, "min", MINUTE), ("min", MINUTE, "s", 1)):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole} {unit} {rest // part} {smaller}" if rest // part else f"{whole} {unit}"
    return f"{seconds} s"


INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (submit, jobs, status, why, watch, cancel):
        app.command()(command)


@contextmanager
def server_at(url: str | None) -> Iterator[ApiClient]:
    """Open the server that the option or the environment names."""
    from lorabbit.config.settings import OperatorSettings  # noqa: PLC0415 - imports are lazy throughout
    from lorabbit_cli.api_client import ApiClient  # noqa: PLC0415

    settings = read_settings(OperatorSettings)
    with ApiClient(url or settings.server_url, token=settings.http_token, trust=settings.trust) as server:
        yield server


def submit(
    file: JobFile,
    overrides: Overrides = [],  # noqa: B006 - typer's way to say "may be repeated"
    seed: Seed = None,
    output: Output = Format.TEXT,
    url: ServerUrl = None,
) -> None:
    """Queue a job on a server.

    It starts once its clients are there and the jobs before it have ended.

    Example: lorabbit submit examples/quickstart.yaml --seed 7
    """
    spec = load_job(file, overrides, seed)
    with server_at(url) as server:
        job = server.submit(spec)
    if output is Format.JSON:
        print_json({"job": job})
    else:
        typer.echo(f"submitted {job}; next: lorabbit watch {job}")


def jobs(output: Output = Format.TEXT, url: ServerUrl = None) -> None:
    """List the server's jobs, oldest first.

    Example: lorabbit jobs --server http://127.0.0.1:8080
    """
    with server_at(url) as server:
        listed = server.jobs()
    if output is Format.JSON:
        print_json(listed)
        return
    if not listed:
        typer.echo("no job has been submitted yet")
        return
    print_table(
        ("job", "status", "submitted", "reason"),
        [(j["job"], j["status"], _clock(j["submitted_ms"]), j["reason"]) for j in listed],
    )


def status(job: Job = None, output: Output = Format.TEXT, url: ServerUrl = None) -> None:
    """Say where a job stands and whom it waits for.

    Example: lorabbit status quickstart
    """
    with server_at(url) as server:
        found = server.status(job)
    if output is Format.JSON:
        print_json(found)
        return
    typer.echo(f"{found['job']}: {found['status']}, {_stage(found)}")
    if found["reason"]:
        typer.echo(f"  reason: {found['reason']}")
    for line in shorter(found):
        typer.echo(f"  {line}")


def why(job: Job = None, output: Output = Format.TEXT, url: ServerUrl = None) -> None:
    """Say for whom a job waits, since when, until when, and what ends the wait.

    Works while the broker or the store is away, too.

    Example: lorabbit why quickstart
    """
    with server_at(url) as server:
        found = server.status(job)
    if output is Format.JSON:
        print_json({name: found[name] for name in ("job", "status", "reason", "waits", "server", "now_ms")})
        return
    for line in lines(found):
        typer.echo(line)


def _stage(found: dict[str, Any]) -> str:
    """Say how far a job is."""
    lost = f", {len(found['lost'])} lost" if found["lost"] else ""
    return f"{found['stage']}, round {found['round']} of {found['rounds']}, {len(found['clients'])} clients{lost}"


def _clock(at_ms: int) -> str:
    """Write a moment in the local time zone."""
    return datetime.fromtimestamp(at_ms / 1000, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def watch(job: Job = None, output: Output = Format.TEXT, url: ServerUrl = None) -> None:
    """Follow a job to its end, and exit as it does.

    With --format json, every event is a line of JSON.

    Example: lorabbit watch quickstart
    """
    with server_at(url) as server:
        name = job or server.newest()
        try:
            ended = _follow_json(server, name) if output is Format.JSON else _follow(server, name)
        except KeyboardInterrupt:
            typer.echo(f"{name} goes on; watch it again with: lorabbit watch {name}", err=True)
            raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(1 if ended.status == "cancelled" else ended.exit_code)


def _follow(server: ApiClient, job: str) -> JobEnded:
    """Show the events as a picture, or as lines."""
    from lorabbit.events.job_events import JobEnded  # noqa: PLC0415 - as above
    from lorabbit_cli.live_view.view import LiveView  # noqa: PLC0415

    with LiveView(server.spec(job)) as view:
        for event in server.watch(job):
            view.feed(event)
            if isinstance(event, JobEnded):
                return event
    raise AssertionError("a watch ends with the job")


def _follow_json(server: ApiClient, job: str) -> JobEnded:
    """Print the events."""
    from lorabbit.events.job_events import JobEnded  # noqa: PLC0415 - as above

    for event in server.watch(job):
        typer.echo(event.model_dump_json())
        if isinstance(event, JobEnded):
            return event
    raise AssertionError("a watch ends with the job")


def cancel(
    job: str = typer.Argument(metavar="JOB", help="A job's name."),
    output: Output = Format.TEXT,
    url: ServerUrl = None,
) -> None:
    """End a job, or take it out of the queue.

    What it has made stays.

    Example: lorabbit cancel quickstart
    """
    with server_at(url) as server:
        answer = server.cancel(job)
    if output is Format.JSON:
        print_json(answer)
    elif answer["cancelled"]:
        typer.echo(f"{job} is being cancelled; what it has made stays: lorabbit report {job}")
    else:
        typer.echo(f"{job} is {answer['status']} already")
