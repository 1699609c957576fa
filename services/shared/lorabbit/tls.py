"""Trust: which authorities a process believes, and the certificate that it shows where a service asks for one.

One setting for every connection: RabbitMQ (``amqps://``), Redis (``rediss://``) and HTTP (``https://``).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from lorabbit.errors import BadInput


@dataclass(frozen=True, slots=True)
class Trust:
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


def distrust(error: BaseException | None) -> str | None:
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
