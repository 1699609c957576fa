"""A client's private state survives restarts and repeats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lorabbit.errors import LoRAbbitError
from lorabbit.types import Json
from lorabbit_client.execution.private_state import PrivateState, read_private, write_private


def keep(folder: Path, task: str, values: dict[str, Json] | None = None, **groups: float) -> PrivateState:
    """Do a task that adds to the state that it finds."""
    state = read_private(folder, task)
    state.values.update(values or {})
    for group, value in groups.items():
        state.tensors[group] = {"w": np.full(3, value, np.float32)}
    write_private(folder, task, state)
    return state


def held(folder: Path, task: str) -> dict[str, float]:
    """What a task finds in each group."""
    return {group: float(tensors["w"][0]) for group, tensors in read_private(folder, task).tensors.items()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_next_task_starts_from_the_state_that_the_last_one_left(tmp_path: Path):
    keep(tmp_path / "k", "t-1", {"seen": 1}, own=1.0)

    assert read_private(tmp_path / "k", "t-2").values == {"seen": 1}
    assert held(tmp_path / "k", "t-2") == {"own": 1.0}


def test_a_task_that_is_executed_again_does_not_see_its_own_effect(tmp_path: Path):
    keep(tmp_path, "t-1", {"seen": 1}, own=1.0)
    keep(tmp_path, "t-2", {"seen": 2}, own=2.0, other=5.0)

    assert read_private(tmp_path, "t-2").values == {"seen": 1}
    assert held(tmp_path, "t-2") == {"own": 1.0}
    assert held(tmp_path, "t-3") == {"own": 2.0, "other": 5.0}


def test_executing_a_task_twice_leaves_what_executing_it_once_leaves(tmp_path: Path):
    keep(tmp_path, "t-1", own=1.0)
    for _ in range(2):
        state = read_private(tmp_path, "t-2")
        state.tensors["own"] = {"w": state.tensors["own"]["w"] + np.float32(1.0)}
        write_private(tmp_path, "t-2", state)

    assert held(tmp_path, "t-3") == {"own": 2.0}


def test_tensors_written_before_a_crash_do_not_count(tmp_path: Path):
    """The process dies between the tensors and the one rename that commits them."""
    keep(tmp_path, "t-1", {"seen": 1}, own=1.0)
    dying = read_private(tmp_path, "t-2")
    dying.tensors["own"] = {"w": np.full(3, 2.0, np.float32)}
    dying.tensors.write(tmp_path)
    (tmp_path / "half.safetensors.tmp").write_bytes(b"\0")
    assert len(files(tmp_path)) == 4

    assert held(tmp_path, "t-2") == {"own": 1.0}
    keep(tmp_path, "t-2", own=3.0)
    assert held(tmp_path, "t-3") == {"own": 3.0}
    assert len(files(tmp_path)) == 3


def test_a_group_that_did_not_change_is_not_written_again(tmp_path: Path):
    keep(tmp_path, "t-1", own=1.0, other=5.0)
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")}

    keep(tmp_path, "t-2", own=2.0, other=5.0)

    after = {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")}
    assert before.items() <= after.items()
    assert len(after) == 3


def test_a_forgotten_group_is_gone_once_no_state_names_it(tmp_path: Path):
    keep(tmp_path, "t-1", own=1.0)
    state = read_private(tmp_path, "t-2")
    del state.tensors["own"]
    write_private(tmp_path, "t-2", state)
    assert held(tmp_path, "t-2") == {"own": 1.0}

    keep(tmp_path, "t-3")

    assert files(tmp_path) == {"private.json"}


def test_a_client_without_state_writes_no_file(tmp_path: Path):
    keep(tmp_path / "k", "t-1")

    assert not (tmp_path / "k").exists()


def test_a_state_without_tensors_from_an_earlier_version_is_read(tmp_path: Path):
    text = json.dumps({"task": "t-1", "before": {}, "after": {"seen": 1}})
    (tmp_path / "private.json").write_text(text, encoding="utf-8")

    state = read_private(tmp_path, "t-2")

    assert (state.values, len(state.tensors)) == ({"seen": 1}, 0)


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "t", "before": {}, "after": {}, "tensors": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "private.json").write_text(text, encoding="utf-8")

    with pytest.raises(LoRAbbitError, match=r"private\.json is damaged"):
        read_private(tmp_path, "t-1")


@pytest.mark.parametrize("damage", ["gone", "flipped", "cut"])
def test_a_damaged_group_is_one_sentence(tmp_path: Path, damage: str):
    keep(tmp_path, "t-1", own=1.0)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-4] if damage == "cut" else content[:-1] + b"\1")

    with pytest.raises(LoRAbbitError, match=r"safetensors is damaged .*remove .*private\.json to start afresh"):
        held(tmp_path, "t-2")
