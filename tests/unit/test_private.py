"""A client's private state survives restarts and repeats."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabbit.errors import LoRAbbitError
from lorabbit_client.private import read_private, write_private


def test_the_next_task_starts_from_the_state_that_the_last_one_left(tmp_path: Path):
    write_private(tmp_path / "k", "t-1", {}, {"seen": 1})

    assert read_private(tmp_path / "k", "t-2") == {"seen": 1}


def test_a_task_that_is_executed_again_does_not_see_its_own_effect(tmp_path: Path):
    write_private(tmp_path, "t-1", {}, {"seen": 1})
    write_private(tmp_path, "t-2", {"seen": 1}, {"seen": 2})

    assert read_private(tmp_path, "t-2") == {"seen": 1}


def test_a_client_without_state_writes_no_file(tmp_path: Path):
    write_private(tmp_path / "k", "t-1", {}, {})

    assert not (tmp_path / "k").exists()


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "private.json").write_text("{", encoding="utf-8")

    with pytest.raises(LoRAbbitError, match=r"private\.json is damaged"):
        read_private(tmp_path, "t-1")
