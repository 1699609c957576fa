"""Where a stress test can run, and the federation of each place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lorabbit.config.settings import OperatorSettings
from lorabbit.errors import BadInput, BrokerUnavailable
from lorabbit_bench.stress.plan import Plan
from lorabbit_bench.stress.runner import Launch
from lorabbit_cli.api_client import Server
from lorabbit_cli.options import read_settings
from lorabbit_cli.scaling.targets import Options, Place, open_scaler

if TYPE_CHECKING:
    from lorabbit_bench.stress.resource_usage import Meter
    from lorabbit_cli.scaling.base import Scaler

SERVICES = {"server": "server", "broker": "rabbitmq", "store": "redis", "clients": "client"}
"""The compose file's name of each tier."""


def place_of(name: str) -> Place:
    """Read --on; raises BadInput."""
    known = [place.value for place in Place]
    if name not in known:
        raise BadInput(f"--on: {name!r} is none of {', '.join(known)}")
    return Place(name)


@contextmanager
def launcher(plan: Plan, on: Place, options: Options, *, pool: str, configured: bool) -> Iterator[Launch]:
    """Say how a federation is made at a place; raises BadInput, or BrokerUnavailable where programs are missing."""
    if on is Place.PROCESSES:
        yield _processes(configured=configured)
        return
    if plan.churn or plan.slow.kind != "none" or plan.per_process:
        raise BadInput("--churn, --slow and --per-process: only --on processes simulates clients; leave them out")
    if configured:
        raise BadInput(f"--configured: --on {on} uses the services of the deployment; leave it out")
    from lorabbit_bench.stress.pool_deployment import PoolFederation, deployed  # noqa: PLC0415 - what one place needs

    with (
        closing(open_scaler(on, options)) as scaler,
        deployed(scaler, pool, _connect, _meter(on, scaler, pool)) as found,
    ):
        yield lambda _, clients: PoolFederation(found, clients)


def _processes(*, configured: bool) -> Launch:
    """Start everything here."""
    from lorabbit_bench.stress import process_deployment  # noqa: PLC0415 - as above
    from lorabbit_bench.stress.process_deployment import ProcessFederation  # noqa: PLC0415

    lacking = None if configured else process_deployment.missing()
    if lacking is not None:
        raise BrokerUnavailable(
            f"there is {lacking} on this machine to start a private one; install it, or name running services with "
            "LORABBIT_BROKER_URL and LORABBIT_REDIS_URL and add --configured"
        )
    return partial(ProcessFederation, configured=configured)


def _connect() -> Server:
    """Open the server that the environment names."""
    settings = read_settings(OperatorSettings)
    return Server(settings.server_url, token=settings.http_token, trust=settings.trust)


def _meter(on: Place, scaler: Scaler, pool: str) -> Meter:
    """Read what a place tells of its tiers: everything of a compose project, the clients of plain containers."""
    if on is Place.KUBERNETES:
        return dict
    from lorabbit_bench.stress.resource_usage import EngineUsage  # noqa: PLC0415 - imports docker

    if on is Place.DOCKER:
        from lorabbit_cli.scaling.docker import POOL  # noqa: PLC0415 - as above

        return EngineUsage({"clients": [f"{POOL}={pool}"]})
    from lorabbit_cli.scaling.compose import PROJECT, SERVICE, Compose  # noqa: PLC0415 - as above

    assert isinstance(scaler, Compose)  # noqa: S101 - as open_scaler gives it
    project = f"{PROJECT}={scaler.project}"
    services = {**SERVICES, "clients": scaler.service(pool)}
    return EngineUsage({tier: [project, f"{SERVICE}={service}"] for tier, service in services.items()})
