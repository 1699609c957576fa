"""A small stress test over a RabbitMQ and a Redis of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorabbit_bench.stress import process_deployment

pytestmark = [pytest.mark.services, pytest.mark.slow]
STRESS = [sys.executable, "-m", "lorabbit_cli", "stress"]
SECONDS = 200.0


@pytest.fixture(autouse=True)
def _programs() -> None:
    lacking = process_deployment.missing_programs()
    if lacking is not None:
        pytest.skip(f"{lacking} on this machine")


def stress(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own command
        [*STRESS, "--out", str(tmp_path / "out"), *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=tmp_path,
    )


def found(tmp_path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((tmp_path / "out" / "stress.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.thorough
def test_five_clients_do_two_rounds_and_every_tier_is_measured(tmp_path: Path) -> None:
    done = stress(tmp_path, "--clients", "5", "--rounds", "2", "--payload", "100KB")

    assert done.returncode == 0, done.stderr
    (row,) = found(tmp_path)["rows"]
    assert (row["clients"], row["rounds"], row["refused"], row["late"], row["lost"]) == (5, 2, 0, 0, 0)
    assert 0 < row["first_update"] <= row["median_update"] <= row["last_update"] <= row["round_p99"]
    assert row["updates_per_second"] > 0
    assert row["mb_per_second"] > 0
    for figures in (row["memory_mb"], row["cpu_ms_per_update"]):
        assert set(figures) == {"server", "broker", "store", "clients"}
    assert all(megabytes > 1 for megabytes in row["memory_mb"].values())
    assert found(tmp_path)["limits"] == []
    assert "5 client processes, one client in each" in (tmp_path / "out" / "stress.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "stress.png").stat().st_size > 0


@pytest.mark.thorough
def test_clients_that_leave_come_back_and_those_too_late_are_counted(tmp_path: Path) -> None:
    options = ["--clients", "6", "--rounds", "3", "--payload", "50KB", "--per-process", "3", "--quorum", "0.5"]
    done = stress(tmp_path, *options, "--churn", "0.4", "--slow", "uniform:0.1:3")

    assert done.returncode == 0, done.stderr
    (row,) = found(tmp_path)["rows"]
    assert row["rounds"] == 3
    assert row["late"] > 0
    assert row["spread"] == "2 client processes, up to 3 clients in each"


@pytest.mark.thorough
def test_a_size_that_meets_a_limit_is_the_last_one_and_the_limit_is_named(tmp_path: Path) -> None:
    done = stress(tmp_path, "--clients", "2,3", "--rounds", "500", "--payload", "1MB", "--time-limit", "4")

    assert done.returncode == 0, done.stderr
    (limit,) = found(tmp_path)["limits"]
    assert limit.startswith("2 clients with 1 MB: time: ")
    assert limit.endswith("of 500 rounds in 4 s (--time-limit)")
    assert [row["clients"] for row in found(tmp_path)["rows"]] == [2]


@pytest.mark.thorough
def test_ctrl_c_stops_everything_that_was_started(tmp_path: Path) -> None:
    with subprocess.Popen(  # noqa: S603 - our own command
        [*STRESS, "--clients", "3", "--rounds", "100000", "--out", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as running:
        root = psutil.Process(running.pid)
        deadline = time.monotonic() + 60
        while not any("stress.client_host" in " ".join(_command(p)) for p in root.children(recursive=True)):
            assert time.monotonic() < deadline, "no client was started"
            assert running.poll() is None, "it ended by itself"
        family = root.children(recursive=True)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)

    assert running.returncode == 130
    assert said.endswith("interrupted\n")
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert len(gone) >= 5
    assert alive == []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
