"""Files that a RabbitMQ of the test run reads when it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

MAX_MESSAGE_BYTES = 16 * 2**20
NARROW = "narrow"
"""A user, and its password, who may write to exchanges and queues of LoRAbbit by name, and not straight to queues."""


def configuration(folder: Path, port: int, settings: str) -> str:
    """Text of rabbitmq.conf; `folder` is where the server sees the definitions."""
    return (
        f"listeners.tcp.default = {port}\n"
        f"max_message_size = {MAX_MESSAGE_BYTES}\n"
        f"load_definitions = {folder}/definitions.json\n"
        "loopback_users = none\n"
        "log.console = true\n"
        "log.console.level = warning\n"
        "disk_free_limit.absolute = 200MB\n"
    ) + settings


def tls_listener(certificates: Path, port: int) -> str:
    """Lines of rabbitmq.conf for a TLS listener."""
    return (
        f"listeners.ssl.default = {port}\n"
        f"ssl_options.cacertfile = {certificates}/ca.pem\n"
        f"ssl_options.certfile = {certificates}/rabbitmq.pem\n"
        f"ssl_options.keyfile = {certificates}/rabbitmq.key\n"
        "ssl_options.verify = verify_none\n"
    )


def formation(names: Sequence[str]) -> str:
    """Lines of rabbitmq.conf for a node of a cluster: whom it looks for at its first start, and who pauses."""
    nodes = [f"cluster_formation.classic_config.nodes.{number} = {name}\n" for number, name in enumerate(names, 1)]
    return "".join(
        [
            "cluster_formation.peer_discovery_backend = classic_config\n",
            *nodes,
            "cluster_partition_handling = pause_minority\n",
        ]
    )


def definitions(vhosts: Sequence[str], password: str) -> str:
    """Users and virtual hosts as the JSON that RabbitMQ loads at boot."""
    everything = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
    narrow = {"user": NARROW, "configure": ".*", "write": "^lorabbit\\..*", "read": ".*"}
    return json.dumps(
        {
            "users": [
                {"name": "guest", "password": password, "tags": "administrator"},
                {"name": NARROW, "password": NARROW, "tags": ""},
            ],
            "vhosts": [{"name": name} for name in vhosts],
            "permissions": [{**who, "vhost": name} for name in vhosts for who in (everything, narrow)],
        }
    )
