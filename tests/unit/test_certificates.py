"""Certificates for development: what is written, and where nothing can be."""

from __future__ import annotations

import pytest

from lorabbit.errors import BadInput
from lorabbit_cli.certificates import make


def test_keys_are_for_their_owner_and_group_alone(tmp_path):
    made = make(tmp_path / "certificates")

    keys = [path for path in made if path.suffix == ".key"]
    assert {path.stem for path in keys} == {"rabbitmq", "redis", "server", "client"}
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o640}


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("x")

    with pytest.raises(BadInput, match="is not empty; name another folder"):
        make(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(BadInput, match=r"file/folder cannot be made: Not a directory; name another folder"):
        make(tmp_path / "file" / "folder")
