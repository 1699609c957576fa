"""Who may import whom, and what a process holds that has nothing to do yet."""

# ruff: noqa: S603 - the interpreter and its tools, by path

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tree import PACKAGES, ROOT, dotted

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "sklearn", "scipy", "pandas", "pyarrow"}
IDLE_MEBIBYTES = 80


def loaded_by(modules: str) -> tuple[set[str], float]:
    """Names of the top-level modules that a fresh interpreter holds after an import, and its memory in MiB."""
    program = (
        f"import {modules}\n"
        "import json, sys, psutil\n"
        "rss = psutil.Process().memory_info().rss / 2**20\n"
        "print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), rss]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    names, mebibytes = json.loads(run.stdout)
    return set(names), mebibytes


def test_every_import_contract_is_kept() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")

    run = subprocess.run(
        [lint_imports, "--no-cache", "--config", ROOT / "pyproject.toml"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )

    assert run.returncode == 0, run.stdout + run.stderr


def test_an_idle_client_is_small_and_holds_no_learning_framework() -> None:
    names, mebibytes = loaded_by(
        "lorabbit_client.__main__, lorabbit_client.agent.agent, lorabbit.broker.rabbitmq.broker"
    )

    assert names.isdisjoint(HEAVY)
    assert mebibytes < IDLE_MEBIBYTES


@pytest.mark.parametrize("module", ["lorabbit_server.__main__", "lorabbit_cli.__main__"])
def test_the_server_and_the_command_line_start_without_a_learning_framework(module: str) -> None:
    names, _ = loaded_by(module)

    assert names.isdisjoint(HEAVY)


def test_the_whole_library_and_server_load_without_a_learning_framework() -> None:
    modules = [dotted(path) for package in ("lorabbit", "lorabbit_server") for path in files(package)]

    names, _ = loaded_by(", ".join(modules))

    assert names.isdisjoint(HEAVY)


def files(package: str) -> list[Path]:
    """Return the module files of a package, without the one that runs it."""
    return sorted(path for path in PACKAGES[package].rglob("*.py") if path.stem != "__main__")
