"""Whole runs in one process, through the command."""

# ruff: noqa: S603 - the command under test
from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from family import Family
from typer.testing import CliRunner

from lorabbit import job_loader
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit_cli.__main__ import app
from lorabbit_cli.local.dry_run import dry_run
from lorabbit_cli.local.embedded_run import Callbacks, ComputeOptions, run_local

NULL = "name: walk\nmodel: {name: 'null:40KB'}\nrounds: 3\nclients: 6\ncohort: 0.5\nevaluation: {on: central}\n"
DIGITS = """
name: digits
model: {name: 'tiny:vit', task: image-classification}
data: {source: digits}
rounds: 2
clients: 3
local: {steps: 3}
"""


def job(folder: Path, text: str = NULL) -> Path:
    file = folder / "job.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_null_job_runs_to_its_end(tmp_path: Path) -> None:
    kinds: list[str] = []

    ended = run_local(
        job_loader.parse(NULL),
        tmp_path,
        compute=ComputeOptions(),
        callbacks=Callbacks(on_event=lambda e: kinds.append(e.kind)),
    )

    assert (ended.exit_code, ended.report.status) == (0, "done")
    assert [len(r.cohort) for r in ended.report.rounds] == [3, 3, 3]
    assert kinds[0] == "job-submitted"
    assert kinds[-1] == "job-ended"
    assert {"adapter", "best", "checkpoint-3", "job.yaml", "report.json", "rounds.jsonl"} <= {
        path.name for path in ended.folder.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["walk"]


def test_a_second_run_of_the_same_name_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    first = run_local(job_loader.parse(NULL), tmp_path, compute=ComputeOptions()).folder
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    second = run_local(job_loader.parse(NULL), tmp_path, compute=ComputeOptions()).folder

    assert (first.name, second.name) == ("walk", "walk-2")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    spec = job_loader.parse(DIGITS.replace("source: digits", "source: nowhere.csv"))

    with pytest.raises(BadInput, match=r"nowhere\.csv"):
        run_local(spec, tmp_path / "runs", compute=ComputeOptions())

    assert list(tmp_path.iterdir()) == []


def test_the_same_job_and_seed_give_the_same_adapter(tmp_path: Path) -> None:
    spec = job_loader.parse(NULL)

    first = run_local(spec, tmp_path, compute=ComputeOptions())
    second = run_local(spec, tmp_path, compute=ComputeOptions())
    other = run_local(spec.model_copy(update={"seed": 1}), tmp_path, compute=ComputeOptions())

    assert (first.folder.name, second.folder.name) == ("walk", "walk-2")
    assert first.report.adapter.sha256 == second.report.adapter.sha256
    assert first.report.adapter.sha256 != other.report.adapter.sha256


@pytest.mark.slow
def test_the_number_of_training_processes_changes_nothing(tmp_path: Path, family: Family) -> None:
    spec = job_loader.parse(DIGITS)

    one = run_local(spec, tmp_path, compute=ComputeOptions(device="cpu", workers=1))
    three = run_local(spec, tmp_path, compute=ComputeOptions(device="cpu", workers=3))

    assert one.report.status == three.report.status == "done"
    assert one.report.adapter.sha256 == three.report.adapter.sha256
    assert family.members() == []


@pytest.mark.parametrize("method", ["fedavg", "ffa-lora"])
@pytest.mark.parametrize("on", ["clients", "central"])
def test_the_forecast_is_what_the_run_then_moves(tmp_path: Path, method: str, on: str) -> None:
    text = NULL.replace("central", on).replace("cohort: 0.5", "cohort: 1.0") + f"method: {{name: {method}}}\n"
    spec = job_loader.parse(text)

    found = dry_run(spec, ComputeOptions())
    report = run_local(spec, tmp_path, compute=ComputeOptions()).report

    assert report.rounds[1].bytes_up == found.round_bytes_up
    assert sum(r.bytes_up + r.bytes_down for r in report.rounds) <= found.total_bytes


def test_bad_input_that_only_the_clients_can_see_ends_the_run_with_exit_code_2(tmp_path: Path, family: Family) -> None:
    text = DIGITS.replace("tiny:vit", "tiny:nothing")

    with pytest.raises(BadInput, match="tiny:nothing"):
        run_local(job_loader.parse(text), tmp_path, compute=ComputeOptions(device="cpu"))

    assert family.members() == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_report_for_programs(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["run", str(job(tmp_path)), "--out", str(tmp_path / "runs"), "--set", "rounds=2", "--format", "json"]
    )

    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert len(report["rounds"]) == 2
    assert Path(report["folder"]) == tmp_path / "runs" / "walk"
    assert (tmp_path / "runs" / "walk" / "report.html").is_file()


def test_the_run_it_leaves_behind_can_be_reported_exported_and_run_again(tmp_path: Path) -> None:
    runner, runs = CliRunner(), tmp_path / "runs"
    runner.invoke(app, ["run", str(job(tmp_path)), "--out", str(runs)])

    reported = runner.invoke(app, ["report", str(runs / "walk"), "--format", "json"])
    exported = runner.invoke(app, ["export", str(runs / "walk"), "--out", str(tmp_path / "adapter")])
    again = runner.invoke(app, ["run", str(runs / "walk" / "job.yaml"), "--out", str(runs), "--format", "json"])

    assert (reported.exit_code, exported.exit_code, again.exit_code) == (0, 0, 0)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads(again.stdout)["adapter"]["sha256"] == json.loads(reported.stdout)["adapter"]["sha256"]


def start(tmp_path: Path, text: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorabbit_cli", "run", str(job(tmp_path, text)), "--out", str(tmp_path / "runs")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_line(process: subprocess.Popen[str], part: str, *, seconds: float = 120.0) -> None:
    """Read lines until one holds a text."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        line = process.stdout.readline()
        if not line:
            break
        if part in line:
            return
    raise AssertionError(f"no line with {part!r}")


@pytest.mark.slow
def test_ctrl_c_ends_the_run_and_says_what_was_kept(tmp_path: Path) -> None:
    process = start(tmp_path, DIGITS.replace("rounds: 2", "rounds: 5000"))
    wait_for_line(process, "round 2/")
    family = psutil.Process(process.pid).children(recursive=True)

    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "is kept; the adapter of the last complete round is in" in err
    assert "cancelled" in out
    assert family
    assert not any(each.is_running() for each in family)
    assert JobSpec.model_validate(job_loader.load(tmp_path / "runs" / "digits" / "job.yaml")).rounds == 5000
