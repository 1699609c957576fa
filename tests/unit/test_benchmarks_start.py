"""The scripts of benchmarks/ find everything that they import: nothing else runs them between two measurements."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.rglob("*.py") if "results" not in path.parts)


@pytest.mark.parametrize("path", SCRIPTS, ids=[str(path.relative_to(BENCHMARKS)) for path in SCRIPTS])
def test_a_script_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    found = runpy.run_path(str(path), run_name="imported")

    assert found["__doc__"]
