"""Certificates for development: an authority of one's own, and what it signs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lorabbit.errors import BadInput

SERVICES = ("rabbitmq", "redis", "server")
LOCAL = ("localhost", "127.0.0.1", "::1")
KEY_MODE = 0o640
"""A key is its owner's and its group's: the group of a mounted volume lets a service's user read it."""


def make(folder: Path, hosts: Iterable[str] = ()) -> list[Path]:
    """Write an authority's certificate, and a certificate with its key for each service and for clients.

    The authority's own key is not kept: whoever needs another certificate makes all of them again. Raises
    BadInput when the folder holds something already or cannot be made.
    """
    try:
        import trustme  # noqa: PLC0415 - an extra that nothing else needs
    except ImportError as error:
        raise BadInput("making certificates needs the package trustme: pip install 'lorabbit[cli]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error.strerror}; name another folder") from error
    if not is_empty:
        raise BadInput(f"{folder} is not empty; name another folder, or remove what is in it")
    authority = trustme.CA(organization_name="LoRAbbit development")
    written = [folder / "ca.pem"]
    authority.cert_pem.write_to_path(str(written[0]))
    for name in (*SERVICES, "client"):
        issued = authority.issue_cert(name, *LOCAL, *hosts, common_name=name)
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_MODE), "wb") as file:
            file.write(issued.private_key_pem.bytes())
        written += [cert, key]
    return written
