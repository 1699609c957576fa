"""Whole runs of methods with own models, in one process: digits, and CNNs of two sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import tiered

from lorabbit import job_loader
from lorabbit.errors import BadInput
from lorabbit.methods.registry import METHODS
from lorabbit.tensors.serialization import read_tensors
from lorabbit_cli.local.dry_run import dry_run, lines
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local

JOB = """
name: own
model: {variants: ['cnn:5', 'cnn:2'], task: image-classification}
data: {source: digits, limit: 300, partition: {kind: pathological, classes: 3}}
method: {name: METHOD}
rounds: 2
clients: 4
local: {steps: 3, batch_size: 8, optimizer: sgd, learning_rate: 0.05}
"""
PERSONAL = sorted(name for name in METHODS if METHODS[name].personal)


def run(folder: Path, method: str, *, workers: int = 1, **changes):
    spec = job_loader.parse(JOB.replace("METHOD", method)).model_copy(update=changes)
    return run_local(spec, folder, compute=ComputeOptions(device="cpu", workers=workers))


@pytest.mark.parametrize("method", tiered(PERSONAL, fast=["pfedlora"], slow=["fedproto", "fml"]))
def test_a_run_ends_with_the_scores_of_every_client(tmp_path: Path, method: str) -> None:
    report = run(tmp_path, method).report

    assert report.status == "done", report.reason
    assert [round_.accepted for round_ in report.rounds] == [4, 4]
    assert all("accuracy" in client.metrics for client in report.rounds[-1].per_client)
    assert len(report.rounds[-1].per_client) == 4


def test_standalone_moves_no_payload_at_all(tmp_path: Path) -> None:
    report = run(tmp_path, "standalone").report

    assert sum(round_.bytes_up + round_.bytes_down for round_ in report.rounds) == 0


def test_pfedlora_moves_the_adapter_and_its_file_holds_nothing_else(tmp_path: Path) -> None:
    ended = run(tmp_path, "pfedlora")
    parameters = 8 * (800 + 10)

    tensors = read_tensors(ended.folder / "adapter" / "adapter_model.safetensors")

    assert ended.report.adapter.parameters == parameters
    assert sorted(tensors) == ["adapter.lora_A", "adapter.lora_B"]
    for round_ in ended.report.rounds:
        assert 0 <= round_.bytes_up - 4 * 4 * parameters < 4 * 1024


def test_clients_that_are_asked_now_and_then_go_on_with_their_own_models(tmp_path: Path) -> None:
    report = run(tmp_path, "pfedlora", cohort=2, rounds=3).report

    assert report.status == "done", report.reason
    assert [len(round_.cohort) for round_ in report.rounds] == [2, 2, 2]


@pytest.mark.slow
def test_the_number_of_training_processes_changes_nothing(tmp_path: Path) -> None:
    one, two = run(tmp_path, "pfedlora", workers=1).report, run(tmp_path, "pfedlora", workers=2).report

    assert one.adapter.sha256 == two.adapter.sha256
    assert [r.metrics for r in one.rounds] == [r.metrics for r in two.rounds]


@pytest.mark.parametrize(
    "method", tiered(["standalone", "lg-fedavg", "fedproto", "fedkd"], slow=["standalone", "lg-fedavg"])
)
def test_the_forecast_of_a_method_with_own_models_is_what_the_run_then_moves(tmp_path: Path, method: str) -> None:
    spec = job_loader.parse(JOB.replace("METHOD", method)).model_copy(update={"rounds": 3})

    found = dry_run(spec, ComputeOptions(device="cpu"))
    report = run_local(spec, tmp_path, compute=ComputeOptions(device="cpu", workers=1)).report

    moved = (report.rounds[1].bytes_up, report.rounds[1].bytes_down)
    forecasted = (found.round_bytes_up, found.round_bytes_down)
    if method == "fedkd":  # its updates are cut to what their energy needs, which nobody knows beforehand
        assert moved <= forecasted
    else:
        assert moved == forecasted
    assert sum(r.bytes_up + r.bytes_down for r in report.rounds) <= found.total_bytes


def test_the_forecast_counts_the_parameters_of_every_own_model_and_calls_none_of_them_shared() -> None:
    found = dry_run(job_loader.parse(JOB.replace("METHOD", "lg-fedavg")), ComputeOptions(device="cpu"))
    told = dict(lines(found))

    assert found.base_parameters is None
    assert list(found.own_parameters) == ["cnn:5", "cnn:2"]
    assert min(found.own_parameters.values()) > found.trainable_parameters > 0
    assert told["model"].startswith(f"cnn:5 ({found.own_parameters['cnn:5']:,} parameters), cnn:2 (")
    assert "trained" not in told


@pytest.mark.parametrize("method", PERSONAL)
def test_ranks_of_clients_are_refused_where_nobody_averages_factors(method: str) -> None:
    text = JOB.replace("METHOD", method).replace("task:", "lora: {client_ranks: [2, 4]}, task:")

    with pytest.raises(BadInput, match=r"model\.lora\.client_ranks: .* averages no LoRA factors"):
        job_loader.parse(text)
