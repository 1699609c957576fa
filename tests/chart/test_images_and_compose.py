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
import yaml
from cases import for_each
from charts import CHART, Doc, containers, objects, render
from tree import ROOT

BIN = Path(sys.executable).parent
DOCKERFILES = sorted((ROOT / "services").rglob("Dockerfile*"))
PROFILES = {
    "gpu": {"client-gpu"},
    "jetson": {"client-jetson"},
    "standby": {"server-standby"},
    "monitoring": {"prometheus", "grafana"},
    "chaos": {"chaos"},
}
ALWAYS = {"rabbitmq", "redis", "server", "client"}
dockerfile = for_each(path=DOCKERFILES)


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


@cache
def secure() -> Doc:
    """What compose makes of its file with the secure one over it."""
    files = ["-f", "compose.yaml", "-f", "compose.secure.yaml"]
    run = subprocess.run(
        [program("docker-compose"), *files, "--profile", "*", "config", "--format", "json"],
        check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("LORABBIT_", "COMPOSE_"))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: Doc = json.loads(run.stdout)
    return found


def make_secrets(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what makes the secure file's secrets."""
    script = ROOT / "services" / "secrets" / "make.sh"
    return subprocess.run(["/bin/sh", script, folder], check=False, capture_output=True, text=True, timeout=60)


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
    entry = 'ENTRYPOINT ["dumb-init", "--single-child", "--", "lorabbit"]'
    for line in ("USER 10001", "STOPSIGNAL SIGTERM", "HEALTHCHECK ", entry, "WORKDIR "):
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
@for_each(profile=(None, *PROFILES))
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


def test_every_service_has_a_memory_limit():
    services = config(*PROFILES)["services"]

    assert [name for name in services if "memory" not in services[name]["deploy"]["resources"]["limits"]] == []


def test_what_is_always_there_has_a_processor_limit():
    services = config()["services"]

    assert {name: services[name]["deploy"]["resources"]["limits"]["cpus"] for name in ALWAYS} == {
        "rabbitmq": 2, "redis": 1, "server": 2, "client": 2,
    }  # fmt: skip


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
def test_the_secure_file_holds_no_password_and_the_servers_take_theirs_from_files():
    services = secure()["services"]

    assert "lorabbit:lorabbit" not in json.dumps(services)
    assert not [name for each in services.values() for name in each.get("environment", {}) if "PASS" in name]
    for name in ("server", "server-standby"):
        taken = {key: value for key, value in services[name]["environment"].items() if key.endswith("_FILE")}
        assert taken.keys() == {
            "LORABBIT_BROKER_URL_FILE", "LORABBIT_MANAGEMENT_URL_FILE", "LORABBIT_REDIS_URL_FILE",
            "LORABBIT_HTTP_TOKEN_FILE",
        }  # fmt: skip
        assert {Path(value).name for value in taken.values()} == {each["source"] for each in services[name]["secrets"]}
        assert not taken.keys() & {f"{key}_FILE" for key in services[name]["environment"]}


@for_each(name=["client", "client-gpu", "client-jetson"])
def test_a_client_of_the_secure_file_has_nothing_but_a_token_to_join_with(name: str):
    client = secure()["services"][name]

    assert client["environment"]["LORABBIT_BROKER_URL"] == "amqps://rabbitmq:5671/"
    assert [secret["source"] for secret in client["secrets"]] == ["join-token"]
    assert [volume["target"] for volume in client["volumes"] if volume["type"] == "bind"] == ["/certificates/ca.pem"]


def test_under_the_secure_file_metrics_are_read_from_the_same_parts_over_tls():
    folder = ROOT / "services" / "monitoring"
    plain, tls = (yaml.safe_load((folder / name).read_text(encoding="utf-8"))["scrape_configs"]
                  for name in ("prometheus.yml", "prometheus.tls.yml"))  # fmt: skip
    mounts = {each["target"]: Path(each["source"]).name for each in secure()["services"]["prometheus"]["volumes"]}

    def parts(jobs: list[Doc]) -> list[tuple[str, Doc]]:
        return [(target.partition(":")[0], static["labels"])
                for job in jobs for static in job["static_configs"] for target in static["targets"]]  # fmt: skip

    assert parts(plain) == parts(tls)
    assert {job["scheme"] for job in tls} == {"https"}
    assert {job["tls_config"]["ca_file"] for job in tls} <= mounts.keys()
    assert mounts["/etc/prometheus/prometheus.yml"] == "prometheus.tls.yml"


def test_the_script_makes_the_secrets_that_the_secure_file_names_and_replaces_none(tmp_path: Path):
    folder = tmp_path / "secrets"
    assert make_secrets(folder).returncode == 0
    made = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    again = make_secrets(folder)

    assert made.keys() == {Path(each["file"]).name for each in secure()["secrets"].values()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert again.returncode != 0
    assert made == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_the_secrets_agree_with_each_other_and_speak_tls_everywhere(tmp_path: Path):
    assert make_secrets(tmp_path / "secrets").returncode == 0
    said = {path.name: path.read_text(encoding="utf-8").strip() for path in (tmp_path / "secrets").iterdir()}
    broker, store = said["rabbitmq.conf"].rpartition(" = ")[2], said["redis-password"]

    assert said["broker-url"] == f"amqps://lorabbit:{broker}@rabbitmq:5671/"
    assert said["management-url"] == f"https://lorabbit:{broker}@rabbitmq:15671/"
    assert said["redis-url"] == f"rediss://:{store}@redis:6379/0"
    assert said["redis.conf"] == f"requirepass {store}"
    assert len({broker, store, said["http-token"]}) == 3
    assert min(len(broker), len(store), len(said["http-token"])) == 48
