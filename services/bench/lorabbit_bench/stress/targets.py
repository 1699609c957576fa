"""Where a stress test can run, and the federation of each place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lorabbit.config.settings import OperatorSettings
from lorabbit.errors import BadInput, BrokerUnavailable
from lorabbit_bench.stress.plan import StressPlan
from lorabbit_bench.stress.runner import DeploymentFactory
from lorabbit_cli.api_client import ApiClient
from lorabbit_cli.options import read_settings
from lorabbit_cli.scaling.targets import ScaleTarget, TargetOptions, open_scaler

if TYPE_CHECKING:
    from lorabbit_bench.stress.resource_usage import Meter
    from lorabbit_cli.scaling.base import Scaler

SERVICES = {"server": "server", "broker": "rabbitmq", "store": "redis", "clients": "client"}
"""The compose file's name of each tier."""


def target_of(name: str) -> ScaleTarget:
    """Read --on; raises BadInput."""
    known = [place.value for place in ScaleTarget]
    if name not in known:
        raise BadInput(f"--on: {name!r} is none of {', '.join(known)}")
    return ScaleTarget(name)


@contextmanager
def deployment_factory(
    plan: StressPlan, on: ScaleTarget, options: TargetOptions, *, pool: str, configured: bool
) -> Iterator[DeploymentFactory]:
    """Say how a federation is made at a place; raises BadInput, or BrokerUnavailable where programs are missing."""
    if on is ScaleTarget.PROCESSES:
        yield _processes(configured=configured)
        return
    if plan.churn or plan.slow.kind != "none" or plan.per_process:
        raise BadInput("--churn, --slow and --per-process: only --on processes simulates clients; leave them out")
    if configured:
        raise BadInput(f"--configured: --on {on} uses the services of the deployment; leave it out")
    from lorabbit_bench.stress.pool_deployment import PoolDeployment, deployed_pool  # noqa: PLC0415 - what one place needs

    with (
        closing(open_scaler(on, options)) as scaler,
        deployed_pool(scaler, pool, _connect, _meter(on, scaler, pool)) as found,
    ):
        yield lambda _, clients: PoolDeployment(found, clients)


def _processes(*, configured: bool) -> DeploymentFactory:
    """Start everything here."""
    from lorabbit_bench.stress import process_deployment  # noqa: PLC0415 - as above
    from lorabbit_bench.stress.process_deployment import ProcessDeployment  # noqa: PLC0415

    lacking = None if configured else process_deployment.missing_programs()
    if lacking is not None:
        raise BrokerUnavailable(
            f"there is {lacking} on this machine to start a private one; install it, or name running services with "
            "LORABBIT_BROKER_URL and LORABBIT_REDIS_URL and add --configured"
        )
    return partial(ProcessDeployment, configured=configured)


def _connect() -> ApiClient:
    """Open the server that the environment names."""
    settings = read_settings(OperatorSettings)
    return ApiClient(settings.server_url, token=settings.http_token, trust=settings.trust)


def _meter(on: ScaleTarget, scaler: Scaler, pool: str) -> Meter:
    """Read what a place tells of its tiers: everything of a compose project, the clients of plain containers."""
    if on is ScaleTarget.KUBERNETES:
        return dict
    from lorabbit_bench.stress.resource_usage import ContainerUsage  # noqa: PLC0415 - imports docker

    if on is ScaleTarget.DOCKER:
        from lorabbit_cli.scaling.docker import POOL  # noqa: PLC0415 - as above

        return ContainerUsage({"clients": [f"{POOL}={pool}"]})
    from lorabbit_cli.scaling.compose import PROJECT, SERVICE, ComposeScaler  # noqa: PLC0415 - as above

    assert isinstance(scaler, ComposeScaler)  # noqa: S101 - as open_scaler gives it
    project = f"{PROJECT}={scaler.project}"
    services = {**SERVICES, "clients": scaler.service(pool)}
    return ContainerUsage({tier: [project, f"{SERVICE}={service}"] for tier, service in services.items()})
