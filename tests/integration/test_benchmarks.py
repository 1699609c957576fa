"""Every benchmark script runs to its end at a tiny size, so that none breaks between two measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import for_each
from tree import ROOT

BENCHMARKS = ROOT / "benchmarks"
SMALL_JOB = ["--set", "data.limit=240", "clients=2", "rounds=1", "local.steps=1"]
TINY: dict[str, list[str]] = {
    "attacks.py": ["--seeds", "1"],
    "codecs.py": ["--job", "examples/digits-cnn.yaml", "--rounds", "1", "--only", "fp32", "int8 up"],
    "examples.py": ["--only", "buffered"],
    "fuzz.py": ["--examples", "20"],
    "overhead.py": SMALL_JOB,
    "quickstart.py": ["--seeds", "1", *SMALL_JOB],
    "simulation.py": ["--clients", "10", "--rounds", "2"],
    "sizes.py": ["--sizes", "25KB", "--chunks", "262144"],
    "soak.py": ["--minutes", "0.1", "--clients", "2", "--rounds", "4"],
    "stress/tuning.py": ["--clients", "2", "--rounds", "1", "--only", "shipped"],
    "transport.py": ["--clients", "1", "--rounds", "2", "--payloads", "0.3"],
}
IN_CONTAINERS = {"images.py"}
ELSEWHERE = {"measure.py": "imported by the others", "measure_all.py": "runs the others"}
"""Scripts without a run of their own."""


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", TINY)
def test_a_benchmark_runs_to_its_end_at_a_tiny_size(script: str, tmp_path: Path) -> None:
    run(script, *TINY[script], "--out", str(tmp_path / "result"))

    stored = [path for path in tmp_path.rglob("*.json") if path.is_file()]
    assert stored, "no result was stored"
    assert any(json.loads(path.read_bytes()).get("rows") for path in stored)


@pytest.mark.containers
@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_the_sizes_of_the_images_are_measured(tmp_path: Path) -> None:
    run("images.py", "--out", str(tmp_path / "images"))

    assert [row["image"] for row in json.loads((tmp_path / "images.json").read_bytes())["rows"]] == [
        "lorabbit-server",
        "lorabbit-client",
    ]


def test_every_script_is_run_by_a_test_or_says_why_not() -> None:
    scripts = {path.relative_to(BENCHMARKS).as_posix() for path in BENCHMARKS.rglob("*.py")}

    left_out = {name for name in scripts if not name.startswith("papers/")} - {*TINY, *IN_CONTAINERS, *ELSEWHERE}

    assert left_out == set()


@pytest.mark.slow
@for_each(script=sorted(path.name for path in (BENCHMARKS / "papers").glob("*.py") if path.name != "plain_peft.py"))
def test_a_script_of_the_papers_starts(script: str) -> None:
    assert "usage" in run(f"papers/{script}", "--help")


def run(script: str, *arguments: str) -> str:
    """Run a script from the root of the repository; its output."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)  # noqa: S603 - our script
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
