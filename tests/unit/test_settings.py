"""Settings that cannot be: both services say which variable and why in one sentence, and exit as for bad input."""

from __future__ import annotations

import pytest

import lorabbit_client.__main__ as client
import lorabbit_server.__main__ as server
from lorabbit.config.settings import ClientSettings, ServerSettings, read_settings, unknown_variables
from lorabbit.errors import BadInput


@pytest.mark.parametrize(
    "broken",
    [
        ("LORABBIT_BROKER_URL", "localhost", "a URL such as amqp://HOST:PORT/ is expected"),
        ("LORABBIT_BROKER_URL", "amqp://u:s3cret@a,,b/", "is expected, for each of the 3 hosts between its commas"),
        ("LORABBIT_BROKER_URL_FILE", "/nowhere/secret", "cannot be read"),
        ("LORABBIT_LOG_LEVEL", "LOUD", "one of DEBUG, INFO, WARNING, ERROR is expected"),
        ("LORABBIT_LOG_FORMAT", "xml", "one of auto, json, text is expected"),
    ],
)
@pytest.mark.parametrize("main", [server.main, client.main])
def test_a_service_names_the_variable_it_cannot_start_with(main, broken, monkeypatch, capsys):
    variable, value, why = broken
    monkeypatch.setenv(variable, value)

    code = main()

    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith(f"error: environment variable {variable}: ")
    assert why in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "variable", "value"),
    [
        (ServerSettings, "LORABBIT_HTTP_PORT", "eighty"),
        (ServerSettings, "LORABBIT_REDIS_URL", "http://127.0.0.1"),
        (ClientSettings, "LORABBIT_ADDRESS", "Site/1"),
        (ClientSettings, "LORABBIT_TAGS", '["open'),
        (ClientSettings, "LORABBIT_QUANTISATION", "int2"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_variable(kind, variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)

    with pytest.raises(BadInput, match=f"^environment variable {variable}: "):
        read_settings(kind)


def test_a_lease_that_ends_between_two_heartbeats_is_refused_also_where_one_of_them_is_the_default(monkeypatch):
    monkeypatch.setenv("LORABBIT_HEARTBEAT_SECONDS", "30")

    with pytest.raises(
        BadInput, match="LORABBIT_CLIENT_LEASE_SECONDS: at least twice LORABBIT_HEARTBEAT_SECONDS, which is 30"
    ):
        read_settings(ServerSettings)

    monkeypatch.setenv("LORABBIT_CLIENT_LEASE_SECONDS", "60")
    assert read_settings(ServerSettings).client_lease_seconds == 60


def test_a_password_in_a_url_that_cannot_be_is_not_shown(monkeypatch):
    monkeypatch.setenv("LORABBIT_BROKER_URL", "amqp://site:s3cret@broker:99999/")

    with pytest.raises(BadInput) as caught:
        read_settings(ServerSettings)

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", ["gpu, fast", '["gpu", "fast"]'])
def test_tags_are_a_list_with_commas_or_json(value, monkeypatch):
    monkeypatch.setenv("LORABBIT_TAGS", value)

    assert read_settings(ClientSettings).tags == ("gpu", "fast")


def test_a_server_that_cannot_make_its_folder_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORABBIT_FOLDER", str(tmp_path / "file" / "server"))

    assert server.main() == 2


def test_a_variable_that_nobody_reads_is_named_with_what_was_meant():
    said = unknown_variables({"LORABBIT_BROKERURL": "amqp://x", "LORABBIT_BROKER_URL": "amqp://y", "HOME": "/root"})

    assert said == [
        "environment variable LORABBIT_BROKERURL is no setting and is not read; did you mean LORABBIT_BROKER_URL?"
    ]


def test_secret_files_sweeps_data_and_variables_of_kubernetes_are_no_strangers():
    known = ("REDIS_URL_FILE", "DATA", "SERVER_SERVICE_HOST", "PORT_8080_TCP_ADDR", "RABBITMQ_PORT")

    assert unknown_variables({f"LORABBIT_{name}": "x" for name in known}) == []
