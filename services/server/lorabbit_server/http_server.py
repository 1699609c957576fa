"""The HTTP server: uvicorn in a thread of its own, bound before anybody is told where."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from lorabbit.errors import BadInput

GRACE_SECONDS = 2


class HttpServer:
    """Serves an application until `close`."""

    def __init__(
        self, app: FastAPI, host: str, port: int, *, cert: Path | None = None, key: Path | None = None
    ) -> None:
        """Bind; raises BadInput when the port is taken or the certificate is none. Port 0 takes a free one.

        With a certificate it speaks TLS and nothing else.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen()  # whoever comes before `start` waits instead of being refused
        except OSError as error:
            self._socket.close()
            raise BadInput(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with LORABBIT_HTTP_PORT"
            ) from error
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            ssl_certfile=cert,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except OSError as error:  # of which ssl.SSLError is one
            self._socket.close()
            raise BadInput(f"LORABBIT_HTTP_CERT and LORABBIT_HTTP_KEY: {cert} cannot be used: {error}") from error
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"{'https' if cert else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Answer what is under way for a moment, then stop."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS + 3)
        self._socket.close()
