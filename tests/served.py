"""A server with its HTTP interface over a real uvicorn, and its loop in a thread, with scripted clients."""

from __future__ import annotations

import threading

import httpx
from scripted_client import ScriptedClient

from lorabbit.broker.memory import MemoryBroker
from lorabbit.config.settings import ServerSettings
from lorabbit.state.redis import RedisStateStore
from lorabbit_server.api.app import make_app
from lorabbit_server.api.metrics import ServerMetrics
from lorabbit_server.http_server import HttpServer
from lorabbit_server.server import Server

SPEC = {"name": "job", "clients": 2, "rounds": 2}


class Served:
    """See the module's docstring; `settings` are further ones of the server."""

    def __init__(self, folder, **settings):
        self.broker, self.store = MemoryBroker(), RedisStateStore.embedded()
        self.settings = ServerSettings(folder=folder / "server", durable=False, **settings)
        self.service = Server(self.broker, self.store, self.settings, owner="server")
        self.measures = ServerMetrics()
        self.service.listen(self.measures.on_event)
        self.ended = threading.Event()
        self.service.on_job_ended(lambda _: self.ended.set())
        self.leading = threading.Event()
        self.service.on_leading(self.leading.set)
        self.clients = [ScriptedClient(self.broker, f"host-{n}", folder / "clients") for n in (1, 2)]
        self.http = HttpServer(make_app(self.service, self.measures), "127.0.0.1", 0)
        self.loop = threading.Thread(target=self.broker.run)
        self.http.start()
        self.loop.start()
        self.web = httpx.Client(base_url=self.http.url, timeout=30)

    def lead(self):
        self.service.start()
        assert self.leading.wait(20)

    def start_clients(self):
        for client in self.clients:
            client.start()

    def run(self, spec=SPEC):
        job = self.web.post("/jobs", json=spec).json()["job"]
        self.start_clients()
        assert self.ended.wait(60)
        return job

    def close(self):
        self.web.close()
        self.http.close()
        self.service.drain(self.broker.stop)
        self.loop.join(20)
        self.store.close()
