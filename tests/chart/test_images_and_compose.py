"""Dockerfiles, the bake file and compose: linted, complete, and of one mind with the chart."""

# ruff: noqa: S603 - programs of this environment, by path
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from charts import CHART, Doc, containers, objects, render
from tree import ROOT

BIN = Path(sys.executable).parent
DOCKERFILES = sorted((ROOT / "services").glob("*/Dockerfile*"))
PROFILES = {
    "gpu": {"client-gpu"},
    "jetson": {"client-jetson"},
    "standby": {"server-standby"},
    "monitoring": {"prometheus", "grafana"},
    "chaos": {"chaos"},
}
ALWAYS = {"rabbitmq", "redis", "server", "client"}
dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def program(name: str) -> Path:
    """A program of this environment."""
    if not (BIN / name).exists():
        pytest.skip(f"there is no build of {name} for this platform")
    return BIN / name


@cache
def config(*profiles: str) -> Doc:
    """What compose makes of its file."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    run = subprocess.run(
        [program("docker-compose"), *chosen, "config", "--format", "json"],
        check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("LORABBIT_", "COMPOSE_"))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: Doc = json.loads(run.stdout)
    return found


SECRETS = {"RABBITMQ_PASSWORD": "broker-s3cret", "REDIS_PASSWORD": "store-s3cret", "LORABBIT_HTTP_TOKEN": "t" * 16}


def secure(**environment: str) -> subprocess.CompletedProcess[str]:
    """What compose makes of its file with the secure one over it."""
    files = ["-f", "compose.yaml", "-f", "compose.secure.yaml", "--profile", "standby"]
    return subprocess.run(
        [program("docker-compose"), *files, "config", "--format", "json"],
        check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("LORABBIT_", "COMPOSE_"))}
        | environment,
    )  # fmt: skip


# ---- images ----
@dockerfile
def test_the_linter_finds_nothing(path: Path):
    run = subprocess.run([program("hadolint"), path], check=False, capture_output=True, text=True, timeout=60)

    assert (run.returncode, run.stdout) == (0, "")


@dockerfile
def test_an_image_needs_no_registry_but_for_its_base(path: Path):
    text = path.read_text(encoding="utf-8")
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - stages
    copied = set(re.findall(r"(?:COPY --from|from)=([\w-]+)", text))

    assert bases <= {"scratch", "${PYTHON_IMAGE}", "${L4T_IMAGE}"}
    assert copied <= stages
    assert not re.search(r"^# *syntax=", text, re.MULTILINE)


@dockerfile
def test_an_image_says_what_it_is_and_how_it_runs(path: Path):
    text = path.read_text(encoding="utf-8")

    labels = re.findall(r"org\.opencontainers\.image\.([\w.]+)=", text)
    assert set(labels) == {"title", "description", "licenses", "base.name", "version", "revision"}
    for line in ("USER 10001", "STOPSIGNAL SIGTERM", "HEALTHCHECK ", 'ENTRYPOINT ["lorabbit"]', "WORKDIR "):
        assert re.search(rf"^{re.escape(line)}", text, re.MULTILINE), line


@dockerfile
def test_packages_are_those_of_the_lock(path: Path):
    installs = re.findall(
        r"pip (?:--python \S+ )?install (.*?)\n(?!\s)", path.read_text(encoding="utf-8") + "\n", re.DOTALL
    )

    assert installs
    assert all("constraints.txt" in each or "--no-deps" in each for each in installs)


def baked() -> dict[str, list[str]]:
    """Tags by target of the bake file, read as text: bake itself needs Docker's plug-in."""
    text = (ROOT / "docker-bake.hcl").read_text(encoding="utf-8")
    version = re.search(r'variable "VERSION" \{ default = "(.*?)" \}', text)
    assert version is not None
    targets = re.findall(r'^target "(.*?)" \{(.*?)^\}', text, re.MULTILINE | re.DOTALL)
    tags = {name: re.findall(r'tags\s*= \["(.*?)"\]', body) for name, body in targets}
    return {name: [t.replace("${REGISTRY}", "").replace("${VERSION}", version[1]) for t in found]
            for name, found in tags.items()}  # fmt: skip


def test_every_image_that_the_chart_asks_for_is_built():
    wanted = {
        container["image"]
        for docs in (render({}), objects(CHART / "values-gpu.yaml"), objects(CHART / "values-jetson.yaml"))
        for _, container, _ in containers(docs)
        if container["image"].startswith("lorabbit-")
    }

    assert wanted == {tag for tags in baked().values() for tag in tags}


def test_what_is_built_has_a_dockerfile_with_that_target():
    text = (ROOT / "docker-bake.hcl").read_text(encoding="utf-8")
    pairs = re.findall(r'dockerfile = "(.*?)"(?:\s+target\s+= "(.*?)")?', text)

    assert len(pairs) == 4
    for file, target in pairs:
        content = (ROOT / file).read_text(encoding="utf-8")
        assert not target or re.search(rf"^FROM \S+ AS {target}$", content, re.MULTILINE), (file, target)


# ---- compose ----
@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_a_profile_adds_its_services_and_no_others(profile: str | None):
    found = config(*([profile] if profile else []))["services"].keys()

    assert found == ALWAYS | PROFILES.get(profile or "", set())


def test_services_keep_to_their_rights():
    for name, service in config(*PROFILES)["services"].items():
        if name in {"rabbitmq", "redis", "chaos"}:
            continue
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_what_a_profile_adds_has_a_memory_limit():
    services = config(*PROFILES)["services"]

    assert [name for name in services.keys() - ALWAYS if "limits" not in services[name]["deploy"]["resources"]] == []


def test_clients_never_reach_redis():
    services = config(*PROFILES)["services"]
    (store,) = services["redis"]["networks"]

    assert {name for name, service in services.items() if store in (service.get("networks") or {})} == {
        "redis", "server", "server-standby",
    }  # fmt: skip


def test_ports_are_open_to_this_machine_alone():
    services = config(*PROFILES)["services"]

    assert {port["host_ip"] for service in services.values() for port in service.get("ports", [])} == {"127.0.0.1"}


def test_everything_that_is_mounted_is_there():
    services = config(*PROFILES)["services"]
    mounted = {volume["source"] for service in services.values() for volume in service.get("volumes", [])
               if volume["type"] == "bind"}  # fmt: skip

    assert [path for path in mounted if path != "/var/run/docker.sock" and not Path(path).exists()] == []
    assert len(mounted) == 7


def test_clients_scale_without_an_edit():
    services = config(*PROFILES)["services"]

    assert "container_name" not in services["client"]
    assert "ports" not in services["client"]
    assert services["client"]["deploy"]["replicas"] == 3


def test_images_of_compose_have_a_version():
    images = {service["image"] for service in config(*PROFILES)["services"].values()}

    assert [image for image in images if ":" not in image or image.endswith(":latest")] == []


# ---- the secure file ----
def test_the_secure_file_speaks_tls_everywhere_and_gives_clients_no_password():
    run = secure(**SECRETS)
    assert run.returncode == 0, run.stderr
    services = json.loads(run.stdout)["services"]

    for name in ("server", "server-standby"):
        environment = services[name]["environment"]
        assert environment["LORABBIT_BROKER_URL"].startswith("amqps://")
        assert environment["LORABBIT_MANAGEMENT_URL"].startswith("https://")
        assert environment["LORABBIT_REDIS_URL"].startswith("rediss://")
        assert environment["LORABBIT_HTTP_CERT"]
    client = services["client"]
    assert client["environment"]["LORABBIT_BROKER_URL"] == "amqps://rabbitmq:5671/"
    assert not [secret for secret in SECRETS.values() if secret in json.dumps(client)]
    assert [volume["target"] for volume in client["volumes"] if volume["type"] == "bind"] == ["/certificates/ca.pem"]


def test_the_secure_file_has_no_default_for_a_secret():
    for name in SECRETS:
        run = secure(**{other: value for other, value in SECRETS.items() if other != name})

        assert run.returncode != 0
        assert f"set {name}" in run.stderr
