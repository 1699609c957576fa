"""URLs of services: how they must look, and the hosts that one names.

A cluster's nodes stand in one URL with commas between, ``amqp://USER:PASSWORD@a:5672,b:5672,c:5672/VHOST``: user,
virtual host and query are the same for all of them.

Trust: which authorities a process believes, and the certificate that it shows where a service asks for one.

One setting for every connection: RabbitMQ (``amqps://``), Redis (``rediss://``) and HTTP (``https://``).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lorabbit.errors import BadInput


def urls_of_hosts(url: str) -> tuple[str, ...]:
    """Return the URL of each host that a URL names, in its order; an empty place stays a URL without a host."""
    parts = urlsplit(url)
    who, at, places = parts.netloc.rpartition("@")
    return tuple(parts._replace(netloc=f"{who}{at}{place.strip()}").geturl() for place in places.split(","))


def url_of(*schemes: str) -> Callable[[str], str]:
    """Check that a text is a URL of one of these schemes, with a port that can be one."""

    def check(text: str) -> str:
        url = urlsplit(text)
        try:
            _ = url.port
        except ValueError:
            # its own words would show a password with a character that has to be escaped
            raise ValueError("the port must be a number up to 65535") from None
        if url.scheme not in schemes or not (url.hostname or url.scheme == "unix"):
            raise ValueError(f"a URL such as {schemes[0]}://HOST:PORT/ is expected")
        return text

    return check


def url_of_cluster(*schemes: str) -> Callable[[str], str]:
    """Check that a text is such a URL, with commas between the hosts where it names several."""
    check_host = url_of(*schemes)

    def check(text: str) -> str:
        urls = urls_of_hosts(text)
        try:
            for url in urls:
                check_host(url)
        except ValueError as error:
            several = f", for each of the {len(urls)} hosts between its commas" if len(urls) > 1 else ""
            raise ValueError(f"{error}{several}") from None
        if len(set(urls)) < len(urls):
            raise ValueError("a host is named twice")
        return text

    return check


def without_password(url: str) -> str:
    """Return a URL fit for a screen."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:***@{host}").geturl()


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """See the module's docstring; `LORABBIT_TLS_*` fill it."""

    ca: Path | None = None
    """Certificates of the authorities to believe, PEM; the system's when None."""
    cert: Path | None = None
    key: Path | None = None
    """Of the own certificate; None where the certificate's file holds both."""
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Return how to open a connection; raises BadInput naming the file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        except (OSError, ssl.SSLError) as error:
            raise BadInput(f"LORABBIT_TLS_CA: {self.ca} holds no certificate that can be read: {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert is not None:
            try:
                context.load_cert_chain(str(self.cert), None if self.key is None else str(self.key))
            except (OSError, ssl.SSLError) as error:
                what = f"{self.cert} and {self.key or 'the key in it'}"
                raise BadInput(f"LORABBIT_TLS_CERT and LORABBIT_TLS_KEY: {what} cannot be used: {error}") from error
        return context


def tls_error(error: BaseException | None) -> str | None:
    """Say why a peer's certificate was refused; None where that was not what went wrong.

    Libraries wrap the error of the TLS layer in their own; its cause and its arguments are searched.
    """
    for _ in range(8):
        if error is None:
            return None
        if isinstance(error, ssl.SSLCertVerificationError):
            todo = "name the authority that signed it in LORABBIT_TLS_CA"
            return f"its certificate cannot be trusted ({error.verify_message}); {todo}"
        inner = (arg for arg in error.args if isinstance(arg, BaseException))
        error = error.__cause__ or error.__context__ or next(inner, None)
    return None
