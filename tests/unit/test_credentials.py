"""A client's credentials: whose they are, and what of them is ever shown."""

from __future__ import annotations

import base64
import hashlib

import pytest

from lorabbit.config.enrollment import JoinRequest, password_hash
from lorabbit.config.settings import ClientSettings
from lorabbit.errors import BadInput
from lorabbit_client.agent.credentials import FILE, PENDING_FILE, Credentials, read, url_of, with_credentials, write

PASSWORD = "p@ss/word?#"
KNOWN = Credentials("site-a", PASSWORD, "0" * 64, "hash")


def test_a_file_of_credentials_is_its_owners_alone_and_is_read_again(tmp_path):
    write(tmp_path / "folder" / FILE, KNOWN)

    assert (tmp_path / "folder" / FILE).stat().st_mode & 0o777 == 0o600
    assert read(tmp_path / "folder" / FILE) == KNOWN
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [FILE]


def test_what_a_killed_client_left_half_written_is_written_again(tmp_path):
    (tmp_path / f"{FILE}.tmp").write_text("{")

    write(tmp_path / FILE, KNOWN)

    assert read(tmp_path / FILE) == KNOWN


def test_a_client_that_has_joined_reaches_every_host_of_a_cluster_as_itself(tmp_path):
    write(tmp_path / FILE, KNOWN)
    settings = ClientSettings(folder=tmp_path, broker_url="amqps://a:5671,b:5671/vhost", address="host")

    assert with_credentials(settings).broker_url == "amqps://site-a:p%40ss%2Fword%3F%23@a:5671,b:5671/vhost"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"user": "a"}', b"\xff"])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)

    with pytest.raises(BadInput, match="is damaged"):
        read(tmp_path / FILE)


def test_a_client_that_has_joined_is_its_user_in_every_respect(tmp_path):
    write(tmp_path / FILE, KNOWN)
    settings = ClientSettings(folder=tmp_path, broker_url="amqps://shared:secret@broker:5671/vhost", address="host")

    mine = with_credentials(settings)

    assert (mine.address, mine.client) == ("site-a", "site-a")
    assert mine.broker_url == "amqps://site-a:p%40ss%2Fword%3F%23@broker:5671/vhost"


def test_a_client_without_a_token_keeps_the_shared_user(tmp_path):
    settings = ClientSettings(folder=tmp_path)

    assert with_credentials(settings) is settings


def test_a_client_that_had_begun_to_join_says_what_it_lacks(tmp_path):
    write(tmp_path / PENDING_FILE, KNOWN)

    with pytest.raises(BadInput, match="LORABBIT_JOIN_TOKEN"):
        with_credentials(ClientSettings(folder=tmp_path))


def test_a_password_is_hashed_as_rabbitmq_keeps_it():
    kept = base64.b64decode(password_hash(PASSWORD))

    assert kept[4:] == hashlib.sha256(kept[:4] + PASSWORD.encode()).digest()
    assert password_hash(PASSWORD) != password_hash(PASSWORD)


def test_nothing_that_holds_a_secret_shows_it():
    wish = JoinRequest(token="a token of sixteen", client="a", password_hash=password_hash(PASSWORD))
    settings = ClientSettings(join_token="a token of sixteen", broker_url="amqp://u:s3cret@h/")

    shown = f"{KNOWN!r} {wish!r} {settings!r}"

    assert not [secret for secret in (PASSWORD, "a token of", wish.password_hash, "s3cret") if secret in shown]


def test_an_address_needs_no_user_where_the_url_names_none():
    assert url_of("amqp://broker", Credentials("a", "b", "", "")) == "amqp://a:b@broker"
