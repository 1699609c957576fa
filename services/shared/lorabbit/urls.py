"""URLs of services: how they must look, and the hosts that one names.

A cluster's nodes stand in one URL with commas between, ``amqp://USER:PASSWORD@a:5672,b:5672,c:5672/VHOST``: user,
virtual host and query are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit


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
