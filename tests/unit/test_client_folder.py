"""Two client processes never work in one folder."""

# ruff: noqa: S603 - the program under test
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOLDER = """
import sys, time
from pathlib import Path
from lorabbit_client.__main__ import _locked
with _locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of the folder, as a running client does."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def client(folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a client on a folder; nothing answers at its broker's address."""
    environment = {**os.environ, "LORABBIT_FOLDER": str(folder), "LORABBIT_BROKER_URL": "amqp://127.0.0.1:1/"}
    return subprocess.run(
        [sys.executable, "-m", "lorabbit_client"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.usefixtures("holder")
def test_a_second_client_in_a_folder_is_refused_in_one_sentence(tmp_path: Path):
    second = client(tmp_path)

    said = second.stdout + second.stderr
    assert second.returncode == 2
    assert f"another client works in {tmp_path}; give each client a folder of its own with LORABBIT_FOLDER" in said
    assert "Traceback" not in said


def test_the_folder_of_a_client_that_was_killed_is_free(holder: subprocess.Popen[str], tmp_path: Path):
    holder.kill()
    holder.wait()

    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as next_one:
        assert next_one.stdout is not None
        assert next_one.stdout.readline() == "held\n"
        next_one.kill()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")

    refused = client(tmp_path / "file")

    said = refused.stdout + refused.stderr
    assert refused.returncode == 2
    assert f"the client's folder {tmp_path / 'file'} cannot be used" in said
    assert "Traceback" not in said
