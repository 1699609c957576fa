"""The command that finds out how many clients a machine supports."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabbit_cli.options import ComposeFiles, Format, Output, print_json, quiet_logs
from lorabbit_cli.scaling.targets import ScaleTarget, TargetOptions

if TYPE_CHECKING:
    from lorabbit_bench.stress.plan import StressPlan
    from lorabbit_bench.stress.runner import DeploymentFactory

_DEFAULT = TargetOptions()
Clients = Annotated[str, typer.Option(metavar="N,N,...", help="Sizes, smallest first.")]
On = Annotated[str, typer.Option(metavar="PLACE", help="Where: processes, compose, docker or kubernetes.")]
Payload = Annotated[
    str | None, typer.Option(metavar="SIZES", help="Sizes of an adapter, such as 0.3,4,16MB; 0.3MB when absent.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of every size.")]
Train = Annotated[str, typer.Option(metavar="KIND", help="null: no training at all; real: a tiny BERT.")]
Churn = Annotated[float, typer.Option(metavar="P", help="Probability that a client leaves during a training.")]
Slow = Annotated[
    str,
    typer.Option(
        metavar="DISTRIBUTION",
        help="Seconds a client takes to train: uniform:LOW:HIGH, exponential:MEAN, lognormal:MEDIAN:SIGMA, "
        "pareto:SHORTEST:ALPHA or none.",
    ),
]
Quorum = Annotated[float, typer.Option(metavar="SHARE", help="Share of the updates that closes a round.")]
TimeLimit = Annotated[
    float, typer.Option(metavar="SECONDS", min=1, help="A size that takes longer is stopped, and larger ones left.")
]
PerProcess = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Clients that one process holds; when absent, so many that 100 hold all."),
]
Configured = Annotated[
    bool,
    typer.Option(
        "--configured",
        help="Use the broker and store that LORABBIT_BROKER_URL and LORABBIT_REDIS_URL name, not private ones.",
    ),
]
Pool = Annotated[str, typer.Option("--pool", metavar="POOL", help="compose, docker, kubernetes: the pool to scale.")]
Image = Annotated[str, typer.Option(help="docker: the client's image.")]
Network = Annotated[str, typer.Option(help="docker: the network on which the broker is.")]
Project = Annotated[str | None, typer.Option(help="compose: the project; the file's name when absent.")]
Namespace = Annotated[str | None, typer.Option(help="kubernetes: the kubeconfig's when absent.")]
Release = Annotated[str | None, typer.Option(help="kubernetes: where several have such a pool.")]
TraceSeed = Annotated[int, typer.Option(min=0, help="Of the traces and the jobs.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where stress.json, stress.md and stress.png go.")]


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(stress)


def stress(  # noqa: PLR0913, PLR0917 - options of the command line
    clients: Clients = "10,50,100",
    on: On = ScaleTarget.PROCESSES.value,
    payload: Payload = None,
    rounds: Rounds = 5,
    train: Train = "null",
    churn: Churn = 0.0,
    slow: Slow = "none",
    quorum: Quorum = 1.0,
    time_limit: TimeLimit = 120.0,
    per_process: PerProcess = None,
    configured: Configured = False,  # noqa: FBT002 - a flag
    pool: Pool = "client",
    image: Image = _DEFAULT.image,
    network: Network = _DEFAULT.network,
    file: ComposeFiles = list(_DEFAULT.files),  # noqa: B006 - typer's way to say "may be repeated"
    project: Project = None,
    namespace: Namespace = None,
    release: Release = None,
    seed: TraceSeed = 0,
    out: Out = Path("stress"),
    output: Output = Format.TEXT,
) -> None:
    """Measure rounds of growing size, up to the machine's limits.

    On processes, starts a server with a private RabbitMQ and Redis, and clients that speak the whole protocol but need
    no model; elsewhere scales a pool of a deployment that runs. Measures every payload at every size, and writes
    seconds, updates and megabytes per second, memory and processor time of each tier as JSON, Markdown and PNG. A
    size that meets a limit (memory, descriptors, threads, disk, processors, time) is the last one, and the limit is
    named. Whatever was started is stopped again, after Ctrl-C too.

    Example: lorabbit stress --clients 10,50,100 --payload 0.3,4MB --rounds 5
    """
    from lorabbit_bench.stress.plan import read_plan  # noqa: PLC0415
    from lorabbit_bench.stress.targets import deployment_factory, target_of  # noqa: PLC0415 - imports are lazy throughout

    quiet_logs()
    plan = read_plan(
        clients, payload, rounds=rounds, train=train, churn=churn, slow=slow, quorum=quorum, time_limit=time_limit,
        per_process=per_process, seed=seed, out=out,
    )  # fmt: skip
    place = target_of(on)
    options = TargetOptions(
        image=image, network=network, files=tuple(file), project=project, namespace=namespace, release=release
    )  # fmt: skip
    with _stopped_cleanly(), deployment_factory(plan, place, options, pool=pool, configured=configured) as launch:
        _measure(plan, on, launch, output)


def _measure(plan: StressPlan, on: str, launch: DeploymentFactory, output: Format) -> None:
    """Do the work of a plan and print what came of it."""
    from rich.console import Console  # noqa: PLC0415 - as above

    from lorabbit_bench.stress.report import StressResults  # noqa: PLC0415
    from lorabbit_bench.stress.runner import StressRunner  # noqa: PLC0415

    work = StressRunner(plan, launch, Console(stderr=True))
    results = StressResults(work, on)
    work.on_row = results.write
    work.run()
    results.write()
    if output is Format.JSON:
        print_json(results.as_json())
    else:
        typer.echo(results.text())
        typer.echo(f"written to {plan.out}", err=True)
    raise typer.Exit(0 if work.rows else 1)


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """Clean up after Ctrl-C and after SIGTERM, without another of them disturbing that."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
