"""Fixtures of several integration tests: drivers that are closed at the end, and certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_rig import Rig

from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit_cli.certificates import make


@pytest.fixture
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., RabbitBroker]]:
    """Open a driver to a URL, as often as a test likes."""
    opened: list[RabbitBroker] = []

    def connect(url: str, **options: Any) -> RabbitBroker:
        opened.append(RabbitBroker(url, name=request.node.originalname, **options))
        return opened[-1]

    yield connect
    for broker in opened:
        broker.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificates for development, of an authority that a module shares."""
    folder = tmp_path_factory.mktemp("certificates")
    make(folder)
    return folder


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A server and two scripted clients on one loop; closed at the end."""
    made = Rig(tmp_path)
    yield made
    if made.service is not None:
        made.service.close()
