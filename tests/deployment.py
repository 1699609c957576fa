"""A server that enrols its clients, over a real broker with its management interface, in threads of this process."""

from __future__ import annotations

import threading
from pathlib import Path

from services import RabbitMQ

from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.enrollment import JoinRequest, JoinTokenRequest, new_secret, password_hash
from lorabbit.config.settings import ServerSettings
from lorabbit.state.redis import RedisStateStore
from lorabbit_client.agent.credentials import Credentials, url_of
from lorabbit_server.api.app import make_app
from lorabbit_server.api.metrics import ServerMetrics
from lorabbit_server.http_server import HttpServer
from lorabbit_server.server import Server

HTTP_TOKEN = "an operator's token"
SECONDS = 60.0


class Enrolling:
    """See the module's docstring."""

    def __init__(self, rabbitmq: RabbitMQ, folder: Path, **settings: object) -> None:
        self.rabbitmq, self.folder = rabbitmq, folder
        self.url = rabbitmq.empty_url()
        self.settings = ServerSettings(
            folder=folder / "server",
            broker_url=self.url,
            management_url=rabbitmq.management_url,
            http_token=HTTP_TOKEN,
            durable=False,
            **settings,
        )
        self.store = RedisStateStore.embedded()
        self.measures = ServerMetrics()
        self.leading, self.ended = threading.Event(), threading.Event()
        self.start()

    def start(self) -> None:
        self.broker = RabbitBroker(self.url, name="enrolling")
        self.service = Server(self.broker, self.store, self.settings, owner="enrolling")
        self.service.listen(self.measures.on_event)
        self.service.on_leading(self.leading.set)
        self.service.on_job_ended(lambda _: self.ended.set())
        self.http = HttpServer(make_app(self.service, self.measures), "127.0.0.1", 0)
        self.http.start()
        self.loop = threading.Thread(target=self.broker.run)
        self.loop.start()
        self.service.start()
        assert self.leading.wait(SECONDS)

    def token(self, **wish: object) -> str:
        return self.service.access.make_token(JoinTokenRequest(**wish), now_ms=self.service.now_ms())[0]

    def join(self, client: str) -> str:
        """Let a client in; the broker's URL with its user."""
        password = new_secret()
        wish = JoinRequest(token=self.token(client=client), client=client, password_hash=password_hash(password))
        self.service.access.join(wish, now_ms=self.service.now_ms())
        return url_of(self.url, Credentials(client, password, "", ""))

    def close(self) -> None:
        self.http.close()
        self.service.drain(self.broker.stop)
        self.loop.join(20)
        self.broker.close()
        self.service.access.close()
        self.store.close()
