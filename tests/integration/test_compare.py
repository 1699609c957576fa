"""`lorabbit compare` whole: null models in processes of their own, a cache on the disk, a kill in the middle."""

# ruff: noqa: S603 - the command under test
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from lorabbit.job_loader import of_content
from lorabbit_bench.compare.cache import CacheKeys, RunCache, RunOutcome
from lorabbit_bench.compare.orchestrator import CompareOptions, choose_parallelism
from lorabbit_cli.__main__ import app

TOY = """
name: toy
base: {model: {name: "null:10KB"}, rounds: 2, clients: 5}
runs:
  small: {}
  big: {model: {name: "null:40KB"}}
seeds: [0, 1]
target: {share: 0.5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text(TOY, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep file and what its first comparison left; copy it."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "toy.yaml").write_text(TOY, encoding="utf-8")
    assert compare(folder / "toy.yaml").exit_code == 0
    return folder


@pytest.fixture
def finished(compared: Path, tmp_path: Path) -> Path:
    """The sweep file of a comparison that has finished once."""
    shutil.copytree(compared, tmp_path / "finished")
    return tmp_path / "finished" / "toy.yaml"


def compare(file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["compare", str(file), "--out", str(file.parent / "out"), *options])


def comparison(file: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((file.parent / "out" / "toy" / "comparison.json").read_text())
    return found


def entries(file: Path) -> dict[str, int]:
    """Outcome files of the cache with the time at which each was written."""
    return {str(path): path.stat().st_mtime_ns for path in (file.parent / "out" / "cache").glob("*/outcome.json")}


def test_a_comparison_runs_everything_and_reports_it(file: Path) -> None:
    result = compare(file, "--format", "json")

    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    rows = said["cases"][0]["rows"]
    assert [(row["label"], row["seeds"]) for row in rows] == [("small", [0, 1]), ("big", [0, 1])]
    assert [row["trainable"] for row in rows] == [2500, 10000]
    assert rows[1]["difference"]["over_seeds"]["n"] == 2
    assert rows[1]["difference"]["over_clients"]["n"] == 10
    assert all(run["peak_memory_bytes"] > 10_000_000 for run in said["runs"])
    assert comparison(file) == {key: value for key, value in said.items() if key != "folder"}


def test_a_finished_run_is_not_repeated(finished: Path) -> None:
    before = entries(finished)

    again = compare(finished)

    assert "(4 runs were finished before)" in again.stdout
    assert entries(finished) == before
    assert len(before) == 4


def test_a_new_seed_runs_alone(finished: Path) -> None:
    before = entries(finished)

    compare(finished, "--seeds", "0,1,2")

    assert len(entries(finished)) == 6
    assert before.items() <= entries(finished).items()


def test_equal_jobs_under_two_labels_run_once(file: Path) -> None:
    file.write_text(TOY.replace('{model: {name: "null:40KB"}}', "{}"), encoding="utf-8")

    result = compare(file, "--format", "json")

    assert len(entries(file)) == 2
    assert [row["seeds"] for row in json.loads(result.stdout)["cases"][0]["rows"]] == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_fresh_runs_everything_again(finished: Path) -> None:
    before = entries(finished)

    compare(finished, "--fresh")

    assert entries(finished).keys() == before.keys()
    assert not entries(finished).items() & before.items()


def test_only_some_runs_can_be_run(file: Path) -> None:
    result = compare(file, "--only", "all/big/*", "--format", "json")

    assert len(entries(file)) == 2
    assert [row["seeds"] for row in json.loads(result.stdout)["cases"][0]["rows"]] == [[], [0, 1]]
    assert compare(file, "--only", "nothing").exit_code == 2


def test_a_report_of_what_is_finished_needs_no_run(file: Path) -> None:
    compare(file, "--only", "all/small/0")

    result = compare(file, "--no-run", "--format", "json")

    assert result.exit_code == 0
    assert len(entries(file)) == 1
    assert sorted(json.loads(result.stdout)["notes"]) == [
        "all/big/0 is missing: not run yet",
        "all/big/1 is missing: not run yet",
        "all/small/1 is missing: not run yet",
    ]


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_stops_no_other(file: Path) -> None:
    file.write_text(
        TOY.replace("  small: {}", "  broken: {model: {name: /nowhere/at/all}}\n  small: {}"), encoding="utf-8"
    )

    result = compare(file)

    assert result.exit_code == 1
    assert "all/broken/0 is missing: model.name: cannot find '/nowhere/at/all'" in result.stderr
    assert len(entries(file)) == 4
    assert len(comparison(file)["runs"]) == 4  # type: ignore[arg-type]


def test_adapters_are_kept_when_asked_for(file: Path) -> None:
    compare(file, "--seeds", "0")
    assert not list((file.parent / "out" / "cache").glob("*/adapter"))

    compare(file, "--seeds", "0", "--keep-adapters")

    assert len(list((file.parent / "out" / "cache").glob("*/adapter"))) == 2


def test_nothing_is_left_of_the_working_folders(file: Path) -> None:
    compare(file)

    assert [path.name for path in (file.parent / "out" / "cache").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_process_and_goes_on(file: Path) -> None:
    file.write_text(TOY.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4, 5]"), encoding="utf-8")
    out = str(file.parent / "out")
    command = [sys.executable, "-m", "lorabbit_cli", "compare", str(file), "--out", out, "--jobs", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/12 all/small/0: ")
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    before = entries(file)
    assert 0 < len(before) < 12

    result = compare(file)

    assert result.exit_code == 0
    assert f"({len(before)} runs were finished before)" in result.stdout
    assert len(entries(file)) == 12
    assert not list((file.parent / "out" / "cache").glob(".work-*"))
    assert before.items() <= entries(file).items()


def test_two_comparisons_do_not_share_a_folder(file: Path) -> None:
    import fcntl  # noqa: PLC0415 - only here

    folder = file.parent / "out" / "toy"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        result = compare(file)

    assert result.exit_code == 2
    assert "another lorabbit compare" in result.stderr


def test_a_key_hangs_on_the_bytes_of_the_data_and_not_on_the_jobs_name(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label\na,0\n", encoding="utf-8")

    def key(name: str = "x", **changes: object) -> str:
        content = {"name": name, "data": {"source": "data.csv"}, **changes}
        return CacheKeys(tmp_path, "cpu").of(of_content(content, name="here"))

    first = key()
    assert key("y", output={"keep_checkpoints": 5}) == first
    assert key(seed=1) != first
    assert key(rounds=2) != first

    (tmp_path / "data.csv").write_text("text,label\na,1\n", encoding="utf-8")
    assert key() != first


def test_a_key_hangs_on_the_files_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    spec = of_content({"model": {"name": str(tmp_path / "model")}}, name="here")

    first = CacheKeys(tmp_path, "cpu").of(spec)
    (tmp_path / "model" / "config.json").write_text("{ }", encoding="utf-8")

    assert CacheKeys(tmp_path, "cpu").of(spec) != first
    assert CacheKeys(tmp_path, "cuda").of(spec) != CacheKeys(tmp_path, "cpu").of(spec)


def test_an_entry_that_is_broken_is_none(tmp_path: Path) -> None:
    cache = RunCache(tmp_path)
    cache.place("k").mkdir()
    (cache.place("k") / "outcome.json").write_text(
        RunOutcome(key="k", status="done").model_dump_json(), encoding="utf-8"
    )
    (cache.place("k") / "report.json").write_text('{"job": ', encoding="utf-8")

    assert cache.find("k") is None


def test_processors_are_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def shared(device: str = "cpu", threads: int = 1, runs: int = 100, jobs: int | None = None) -> tuple[int, int]:
        effort = choose_parallelism(device, threads, CompareOptions(tmp_path, tmp_path, "", jobs=jobs), runs)
        return effort.jobs, effort.workers

    assert shared() == (8, 1)
    assert shared(threads=2) == (4, 1)
    assert shared(runs=2) == (2, 4)
    assert shared(jobs=1) == (1, 8)
    assert shared("cuda") == (1, 8)
