"""The federation as a user starts it: images, compose, the command line inside the server's container."""

# ruff: noqa: S603, S607 - docker by name, the interpreter of the test run by path
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from cases import tiered
from processes import idle_job
from services import free_port
from tree import ROOT

# Less of the quickstart, so that it fits into a test run.
LESS = ["--set", "rounds=2", "--set", "data.limit=400", "--set", "local.steps=3"]
QUICKSTART = "/examples/quickstart.yaml"
BUILD_SECONDS = 900
JOB_SECONDS = 600
MANY = 12
# Nobody trains: the machine is free to start containers. It goes on until it is cancelled.
ROUNDS = 1_000_000
WALK = idle_job(ROUNDS)
pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(BUILD_SECONDS + JOB_SECONDS)]


class Compose:
    """One compose project with a name and port of its own, and images: LORABBIT_TEST_TAG names some that are there."""

    def __init__(self) -> None:
        self.tag = os.environ.get("LORABBIT_TEST_TAG") or f"test-{uuid4().hex[:8]}"
        self.project = f"lorabbit-test-{uuid4().hex[:8]}"
        settings = {"LORABBIT_TAG": self.tag, "LORABBIT_PORT": str(free_port()), "DOCKER_BUILDKIT": "1"}
        self._environment = {**os.environ, **settings}

    def __call__(self, *arguments: str, seconds: float = 300, given: str = "") -> str:
        """Run `docker compose ARGUMENTS` with a standard input; its standard output."""
        return self._run(["docker", "compose", "--project-name", self.project, *arguments], seconds, given)

    def operator(self, *arguments: str) -> str:
        """Run `lorabbit ARGUMENTS` inside the server's container."""
        return self("exec", "-T", "server", "lorabbit", *arguments, seconds=JOB_SECONDS)

    def submit(self, job: dict[str, Any]) -> str:
        """Queue a job; its name."""
        command = ["exec", "-T", "server", "lorabbit", "submit", "-", "--format", "json"]
        name: str = json.loads(self(*command, given=json.dumps(job)))["job"]
        return name

    def status(self, job: str) -> dict[str, Any]:
        """Where a job stands."""
        found: dict[str, Any] = json.loads(self.operator("status", job, "--format", "json"))
        return found

    def scale(self, number: int, *where: str, **settings: str) -> dict[str, Any]:
        """Run `lorabbit scale` on this machine, with the variables of compose and these."""
        command = [sys.executable, "-m", "lorabbit_cli", "scale", str(number), *where, "--format", "json"]
        done: dict[str, Any] = json.loads(self._run(command, JOB_SECONDS, settings=settings))
        return done

    def client(self, *arguments: str, given: str = "") -> str:
        """Run a command of the client's image with a standard input, outside the federation."""
        image = f"lorabbit-client:{self.tag}"
        return self._run(["docker", "run", "--rm", "--interactive", image, *arguments], JOB_SECONDS, given)

    def forget(self, pool: str) -> None:
        """Remove the volumes of a pool of plain containers."""
        listed = self._run(["docker", "volume", "ls", "--quiet", "--filter", f"label=lorabbit.pool={pool}"], 60)
        self._run(["docker", "volume", "rm", *listed.split()], 60)

    def close(self) -> None:
        """Remove everything; an engine that keeps the network of containers that are gone fails no test."""
        try:
            self("down", "--volumes", "--remove-orphans", "--timeout", "5")
        except pytest.fail.Exception as failure:
            if "has active endpoints" not in str(failure):
                raise
        if "LORABBIT_TEST_TAG" in os.environ:
            return
        self._run(["docker", "image", "rm", f"lorabbit-server:{self.tag}", f"lorabbit-client:{self.tag}"], 60)

    def _run(self, command: list[str], seconds: float, given: str = "", settings: dict[str, str] | None = None) -> str:
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=seconds, cwd=ROOT, input=given,
            env=self._environment | (settings or {}),
        )  # fmt: skip
        if run.returncode != 0:
            pytest.fail(f"{' '.join(command)} ended with {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-8000:]}")
        return run.stdout


def has_engine() -> bool:
    """Tell whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    if not has_engine():
        if os.environ.get("CI") == "true":
            pytest.fail("no Docker engine answers")
        pytest.skip("no Docker engine answers")
    project = Compose()
    try:
        if "LORABBIT_TEST_TAG" not in os.environ:
            project("build", "--quiet", seconds=BUILD_SECONDS)
        yield project
    finally:
        project.close()


@pytest.mark.parametrize("clients", tiered([3, 8], slow=[3]))
def test_the_quickstart_under_compose_makes_the_adapter_of_one_process(compose: Compose, clients: int) -> None:
    sized = [*LESS, "--set", f"clients={clients}"]
    compose("up", "--detach", "--wait", "--no-recreate", "--scale", f"client={clients}")

    job = json.loads(compose.operator("submit", QUICKSTART, *sized, "--format", "json"))["job"]
    compose.operator("watch", job)

    report = reported(compose, job)
    embedded = json.loads(compose.client("run", QUICKSTART, *sized, "--format", "json", "--out", "/tmp/runs"))  # noqa: S108
    assert report["adapter"]["sha256"] == embedded["adapter"]["sha256"]
    assert len(report["clients"]) == clients
    assert report["rounds"][-1]["metrics"] == embedded["rounds"][-1]["metrics"]


def test_the_adapter_is_exported_from_inside_the_server(compose: Compose) -> None:
    job = json.loads(compose.operator("jobs", "--format", "json"))[-1]["job"]

    compose.operator("export", job, "--out", "/tmp/exported")  # noqa: S108

    digest = compose("exec", "-T", "server", "sha256sum", "/tmp/exported/adapter_model.safetensors").split()[0]  # noqa: S108
    config = json.loads(compose("exec", "-T", "server", "cat", "/tmp/exported/adapter_config.json"))  # noqa: S108
    assert digest == reported(compose, job)["adapter"]["sha256"]
    assert config["peft_type"] == "LORA"


def test_the_server_image_holds_no_learning_framework(compose: Compose) -> None:
    program = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'peft') if u.find_spec(n)])"

    found = compose("exec", "-T", "server", "python", "-c", program).strip()

    assert found == "[]"


def test_nobody_runs_as_root_or_writes_to_the_image(compose: Compose) -> None:
    script = "id -u; touch /opt/lorabbit/written 2>/dev/null && echo written || echo refused"

    said = [compose("exec", "-T", service, "sh", "-c", script).split() for service in ("server", "client")]

    assert said == [["10001", "refused"]] * 2


@pytest.mark.thorough
def test_a_job_loses_nothing_while_its_pool_goes_to_twelve_clients_and_back(compose: Compose) -> None:
    compose("up", "--detach", "--wait", "--no-recreate", "--scale", "client=3")
    where = ["--on", "compose", "--project", compose.project]
    job = compose.submit(WALK)

    scaled, seen = [], []
    # With two of its three clients it stands still in the middle of a round.
    for number in (2, MANY, 3):
        scaled.append(compose.scale(number, *where))
        seen.append(compose.status(job))
    compose.operator("cancel", job)

    rounds = reported(compose, job)["rounds"][: seen[-1]["round"] - 1]
    embedded = json.loads(compose.client("run", "-", "--format", "json", "--out", "/tmp/runs",  # noqa: S108
                                         given=json.dumps(WALK | {"rounds": len(rounds)})))  # fmt: skip
    assert [(done["before"], done["clients"]) for done in scaled] == [(3, 2), (2, MANY), (MANY, 3)]
    assert [each["status"] for each in seen] == ["running"] * 3
    assert seen[0]["round"] < seen[1]["round"] < seen[2]["round"]
    assert [entry["accepted"] for entry in rounds] == [3] * len(rounds)
    assert rounds[-1]["sha256"] == embedded["adapter"]["sha256"]


def test_a_pool_of_plain_containers_does_a_job_beside_compose(compose: Compose) -> None:
    compose("up", "--detach", "--wait", "--no-recreate", "--scale", "client=0")
    pool = compose.project.removeprefix("lorabbit-")
    where = ["--on", "docker", "--pool", pool, "--image", f"lorabbit-client:{compose.tag}"]
    where += ["--network", f"{compose.project}_messages"]
    broker = {"LORABBIT_BROKER_URL": "amqp://lorabbit:lorabbit@rabbitmq:5672/"}
    try:
        assert compose.scale(2, *where, **broker)["before"] == 0
        job = compose.submit(WALK | {"name": "beside", "clients": 2, "rounds": 5})
        compose.operator("watch", job)
        assert [entry["accepted"] for entry in reported(compose, job)["rounds"]] == [2] * 5
    finally:
        gone = compose.scale(0, *where, **broker)
        compose.forget(pool)
    assert (gone["before"], gone["clients"]) == (2, 0)


def reported(compose: Compose, job: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(compose.operator("report", job, "--format", "json"))
    return report
