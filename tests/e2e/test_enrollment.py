"""Server and clients as processes: TLS to everything, a user for every client, and no secret in anything they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import httpx
import pytest
import services
from processes import START_SECONDS, Process
from services import free_port, serve

from lorabbit.config.network import TlsSettings
from lorabbit_cli.certificates import make

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]
JOB = {"name": "first", "model": {"name": "null:40KB"}, "clients": 2, "rounds": 2}
ADMINISTRATOR, STORE, OPERATOR = "administrators-s3cret", "stores-s3cret", "operators-s3cret-0123456789"
NOT_ALLOWED = 4
SECONDS = 120.0


class Secure:
    """A federation of processes, and the operator's command line."""

    def __init__(self, folder, rabbitmq, redis, certificates):
        self.folder = folder
        trust = {"LORABBIT_TLS_CA": str(certificates / "ca.pem")}
        port = free_port()
        self.url = f"https://127.0.0.1:{port}"
        self.verify = TlsSettings(certificates / "ca.pem").context()
        logs = {"LORABBIT_LOG_FORMAT": "json", "LORABBIT_LOG_LEVEL": "DEBUG"}
        nobody = f"127.0.0.1:{free_port()}"  # as of a cluster's node that is away
        secrets = {
            "BROKER_URL": rabbitmq.tls_url.replace("@", f"@{nobody},"),
            "MANAGEMENT_URL": rabbitmq.management_url.replace("@", f"@{nobody},"),
            "REDIS_URL": redis.tls_url,
            "HTTP_TOKEN": OPERATOR,
        }
        server = {"LORABBIT_HTTP_PORT": str(port), "LORABBIT_HTTP_CERT": str(certificates / "server.pem")}
        server["LORABBIT_HTTP_KEY"] = str(certificates / "server.key")
        for name, value in secrets.items():
            (folder / name).write_text(value + "\n")
            server[f"LORABBIT_{name}_FILE"] = str(folder / name)
        self.operator = {
            **trust,
            **server,
            "LORABBIT_SERVER_URL": self.url,
            "LORABBIT_FOLDER": str(folder / "operator"),
        }
        self.server = Process("lorabbit_server", folder / "server", trust | logs | server)
        place = rabbitmq.tls_url.rpartition("@")[2]
        self.client = (
            trust | logs | {"LORABBIT_BROKER_URL": f"amqps://{nobody},{place}", "LORABBIT_SERVER_URL": self.url}
        )
        self.clients = {}

    def start_client(self, name, **more):
        self.clients[name] = Process(
            "lorabbit_client", self.folder / name, {**self.client, "LORABBIT_ADDRESS": name, **more}
        )
        self.clients[name].start()

    def lorabbit(self, *arguments):
        """Run a command of the operator's; what it wrote, and its exit code."""
        command = [sys.executable, "-m", "lorabbit_cli", *arguments]
        environment = {**os.environ, **self.operator}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
        with (self.folder / "operator.log").open("a") as log:
            log.write(run.stdout + run.stderr if arguments[0] != "token" else run.stderr)
        return run

    def ask(self, path):
        return httpx.get(
            self.url + path, verify=self.verify, headers={"Authorization": f"Bearer {OPERATOR}"}, timeout=30
        )

    def wait_until_up(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/readyz", verify=self.verify, timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self.server.tail())

    def run(self, name):
        """Run another job to its end."""
        token = {"Authorization": f"Bearer {OPERATOR}"}
        httpx.post(f"{self.url}/jobs", json={**JOB, "name": name}, verify=self.verify, headers=token, timeout=30)
        self.wait_for(name)

    def wait_for(self, name):
        """Wait until a job is done."""
        deadline, after = time.monotonic() + SECONDS, ""
        while time.monotonic() < deadline:
            for each in self.ask(f"/jobs/{name}/events?wait=5{after}").json():
                after = f"&after={each['id']}"
                if each["event"]["kind"] == "job-ended":
                    assert each["event"]["status"] == "done", each
                    return
        raise AssertionError(f"{name} is not done\n{self.server.tail()}")

    def close(self):
        for process in (self.server, *self.clients.values()):
            process.kill()


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    certificates = folder / "certificates"
    make(certificates)
    brokers = serve(lambda: services.RabbitMQ(admin=True, certificates=certificates, password=ADMINISTRATOR))
    stores = serve(lambda: services.Redis(certificates=certificates, password=STORE))
    made = Secure(folder, next(brokers), next(stores), certificates)
    try:
        made.server.start()
        made.wait_until_up()
        yield made
    finally:
        made.close()
        for each in (brokers, stores):
            next(each, None)


@pytest.mark.thorough
def test_clients_join_work_restart_and_are_revoked_and_no_secret_is_written(secure):
    tokens = {name: secure.lorabbit("token", "--client", name).stdout.strip() for name in ("site-a", "site-b")}
    for name, token in tokens.items():
        secure.start_client(name, LORABBIT_JOIN_TOKEN=token)
    (secure.folder / "job.yaml").write_text(json.dumps(JOB))
    assert secure.lorabbit("submit", str(secure.folder / "job.yaml")).stdout.startswith("submitted first;")
    secure.wait_for("first")

    # Whoever has joined needs its token no more.
    kept = secure.folder / "site-a" / "credentials.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    secure.clients["site-a"].kill()
    secure.start_client("site-a")
    secure.run("second")

    # One that was revoked ends, and says why; a token of its own lets it in again.
    revoked = secure.lorabbit("revoke", "site-a")
    assert revoked.stdout.startswith("site-a is revoked")
    assert secure.clients["site-a"].wait(SECONDS) == NOT_ALLOWED
    last = json.loads(secure.clients["site-a"].tail().splitlines()[-1])
    assert last["event"] == "client-not-allowed"
    assert "refuses the user site-a" in last["why"]
    assert "LORABBIT_JOIN_TOKEN" in last["why"]
    secrets = [*tokens.values(), json.loads(kept.read_text())["password"]]
    again = secure.lorabbit("token", "--client", "site-a").stdout.strip()
    secure.start_client("site-a", LORABBIT_JOIN_TOKEN=again)
    secure.run("third")
    secrets += [again, json.loads(kept.read_text())["password"], ADMINISTRATOR, STORE, OPERATOR]

    told = secure.lorabbit("doctor", "--format", "json").stdout
    assert "rediss://" in told
    told += "".join(secure.ask(f"/jobs/first/{what}").text for what in ("events", "report", "spec"))
    told += "".join(secure.ask(path).text for path in ("/clients", "/tokens", "/jobs/first", "/metrics", "/readyz"))
    written = [
        path for path in secure.folder.rglob("*") if path.suffix in {".log", ".json", ".yaml", ".md", ".html", ".txt"}
    ]
    told += "".join(path.read_text(errors="replace") for path in written if path != kept and path.name != kept.name)
    assert len(told) > 10_000
    assert [secret for secret in secrets if secret in told] == []


def test_a_client_with_a_token_that_is_none_ends_with_the_servers_sentence(secure):
    secure.start_client("site-x", LORABBIT_JOIN_TOKEN="this is no token at all")

    assert secure.clients["site-x"].wait(SECONDS) == NOT_ALLOWED
    assert "the server knows no such join token" in secure.clients["site-x"].tail()


def test_an_operator_without_the_servers_token_is_told_which_setting_it_lacks(secure):
    answer = httpx.get(f"{secure.url}/jobs", verify=secure.verify, timeout=30)
    environment = {
        **os.environ,
        "LORABBIT_SERVER_URL": secure.url,
        "LORABBIT_TLS_CA": secure.operator["LORABBIT_TLS_CA"],
    }
    command = [sys.executable, "-m", "lorabbit_cli", "jobs"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603

    assert answer.status_code == httpx.codes.UNAUTHORIZED
    assert run.returncode == NOT_ALLOWED
    assert run.stderr.startswith("error: this server answers its operator alone; set LORABBIT_HTTP_TOKEN")
