"""Link: one connection to RabbitMQ in an I/O thread of its own, for ever.

pika's connections belong to one thread; everybody else hands functions over with `call`, which wakes
the thread at once. The asynchronous adapter is used because it says what the blocking one keeps
silent: a channel that the broker closed (a consumer timeout, a bad acknowledgement), a consumer that
it cancelled, an alarm that blocks publishing. A lost connection is made again with full jitter, each time
to the next host of several, and functions that were handed over in the meantime run then.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - needed for every host's name; loaded late, without memory, it is missing for good
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import pika
import structlog
from pika.adapters.select_connection import IOLoop
from pika.exceptions import AMQPError, ProbableAuthenticationError

from lorabbit.config.network import TlsSettings, tls_error
from lorabbit.errors import NotAllowed
from lorabbit.runtime.backoff import Backoff

HEARTBEAT_SECONDS = 20
BLOCKED_SECONDS = 300.0
CONNECT_SECONDS = 10.0
REFUSED = "ACCESS_REFUSED"
"""How RabbitMQ answers a name and a password that do not belong together."""
NOT_FOUND = 404
"""How the broker answers whoever names an exchange or a queue that it does not have."""
RECEIVE_BYTES = 128 * 1024
"""pika reads 4 KiB at a time and joins them to frames of 128 KiB; larger reads take a third off the time per chunk."""

log = structlog.get_logger()
# pika reports one refused connection in nine lines of ERROR; `broker-lost` says it in one.
logging.getLogger("pika").setLevel(logging.CRITICAL)


def parameters_of(url: str, name: str, trust: TlsSettings) -> pika.URLParameters:
    """What to connect with; settings in the URL's query give way to ours, except for `ssl_options` and `heartbeat`."""
    parameters = pika.URLParameters(url)
    if parameters.ssl_options is not None and "ssl_options=" not in url:
        parameters.ssl_options = pika.SSLOptions(trust.context(), parameters.host)
    if parameters.heartbeat is None:
        parameters.heartbeat = HEARTBEAT_SECONDS
    parameters.blocked_connection_timeout = BLOCKED_SECONDS
    parameters.socket_timeout = CONNECT_SECONDS
    parameters.stack_timeout = CONNECT_SECONDS
    parameters.connection_attempts = 1
    parameters.client_properties = {"connection_name": name}
    return parameters


class Connection:
    """See the module's docstring. Who uses it learns of each connection on the I/O thread."""

    def __init__(
        self,
        urls: Sequence[str],
        name: str,
        *,
        trust: TlsSettings,
        on_bug: Callable[[BaseException], None],
        refused_seconds: float | None = None,
    ) -> None:
        """Prepare; `start` begins to connect, to the first of `urls`. `on_bug` gets an error that is not the network's.

        After `refused_seconds` in which the broker knows no such user or password that is NotAllowed; never when None.
        """
        self.name = name
        self._hosts = [parameters_of(url, name, trust) for url in urls]
        self._on_bug = on_bug
        self._on_up = self._on_down = _nothing
        self._everywhere = ", ".join(map(_place, self._hosts))
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._io: IOLoop | None = None
        self._woken = False
        self.connection: pika.SelectConnection | None = None
        """The open connection; for the I/O thread."""
        self.has_been_up = False
        """Whether there ever was a connection."""
        self._closing = False
        self._hurry = threading.Event()
        self._backoff = Backoff(0.2, 30.0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._refused_seconds = refused_seconds
        self._refused_since: float | None = None
        self._refusal: str | None = None
        """How the broker refused the user at the last try, where it did."""
        self._down: str | None = f"connecting to RabbitMQ at {self._everywhere}"
        self._blocked: str | None = None

    def start(self, *, on_up: Callable[[], None], on_down: Callable[[], None]) -> None:
        """Begin to connect, in the background."""
        self._on_up, self._on_down = on_up, on_down
        self._thread.start()

    @property
    def parameters(self) -> pika.URLParameters:
        """What is connected to, or tried next."""
        return self._hosts[0]

    @property
    def _where(self) -> str:
        return _place(self.parameters)

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the I/O thread, once there is a connection; callable from any thread."""
        with self._lock:
            self._calls.append(function)
            if self._io is not None and not self._woken:
                self._woken = True
                self._io.add_callback_threadsafe(self._run_calls)

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Run a function on the I/O thread later, if the connection is then still this one; for the I/O thread."""
        connection = self.connection
        if self._io is not None:
            self._io.call_later(seconds, lambda: function() if connection is self.connection else None)

    def move_on(self, why: str) -> None:
        """Leave this host for the next one, if there are several; for the I/O thread."""
        if len(self._hosts) > 1 and self.connection is not None and self.connection.is_open:
            self.connection.close(reply_text=why)

    def hurry(self) -> None:
        """Try to connect now instead of later, because the broker is known to be there; callable from any thread."""
        self._hurry.set()

    def health(self) -> str | None:
        """What keeps the connection from working, as a sentence; None if nothing."""
        return self._down or self._blocked

    def close(self, timeout_seconds: float) -> None:
        """Close the connection and end the thread."""
        self._closing = True
        self._hurry.set()
        with self._lock:
            if self._io is not None:
                self._io.add_callback_threadsafe(self._hang_up)
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._connect_and_serve()
            except (AMQPError, OSError) as error:
                self._note_down(error)
            except BaseException as error:  # noqa: BLE001 - reported where it ends the process
                self._on_bug(error)
                return
            if self._refusal is not None and self._is_refused_for_good():
                self._on_bug(NotAllowed(self._refusal))
                return
            self._hosts.append(self._hosts.pop(0))
            self._hurry.wait(self._backoff.next_seconds())
            self._hurry.clear()

    def _connect_and_serve(self) -> None:
        """Connect, and return when the connection has ended."""
        io = IOLoop()
        with self._lock:
            self._io, self._woken = io, False
        try:
            pika.SelectConnection(
                self.parameters,
                on_open_callback=self._opened,
                on_open_error_callback=self._ended,
                on_close_callback=self._ended,
                custom_ioloop=io,
            )
            if self._closing:
                return
            io.start()
        finally:
            was_up, self.connection = self.connection is not None, None
            with self._lock:
                self._io = None
            io.close()
            if was_up:
                self._on_down()

    def _opened(self, connection: pika.SelectConnection) -> None:
        connection.add_on_connection_blocked_callback(self._note_blocked)
        connection.add_on_connection_unblocked_callback(self._note_unblocked)
        _read_whole_frames(connection)
        self._backoff.reset()
        self._refused_since = None
        self.has_been_up = True
        self.connection, self._down, self._blocked = connection, None, None
        log.info("broker-connected", connection=self.name, where=self._where)
        self._on_up()
        self._run_calls()

    def _ended(self, _connection: pika.SelectConnection, error: BaseException | str) -> None:
        self._note_down(error)
        if self._io is not None:
            self._io.stop()

    def _note_down(self, error: BaseException | str) -> None:
        # Once per outage; every further try that fails says the same.
        if not self._closing and (self._down is None or self._down.startswith("connecting")):
            log.warning("broker-lost", connection=self.name, where=self._where, why=_reason(error))
        self._down, self._refusal = f"RabbitMQ at {self._everywhere} cannot be reached: {_reason(error)}", None
        if isinstance(error, ProbableAuthenticationError) and REFUSED in str(error):
            user = getattr(self.parameters.credentials, "username", "nobody")
            self._refusal = f"RabbitMQ at {self._where} refuses the user {user}: it has none with this password"
            self._down = self._refusal
            self._refused_since = self._refused_since or time.monotonic()

    def _is_refused_for_good(self) -> bool:
        """Tell whether the broker has been there for long enough and does not know this user."""
        if self._refused_seconds is None or self._refused_since is None:
            return False
        return time.monotonic() - self._refused_since >= self._refused_seconds

    def _note_blocked(self, _connection: object, frame: pika.frame.Method) -> None:
        self._blocked = f"RabbitMQ at {self._where} takes no messages: {frame.method.reason} alarm"
        log.warning("broker-blocked", connection=self.name, why=frame.method.reason)

    def _note_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = None
        log.info("broker-unblocked", connection=self.name)

    def _run_calls(self) -> None:
        """Run what was handed over; while there is no connection it stays for the next one."""
        with self._lock:
            self._woken = False
            if self.connection is None:
                return
            calls, self._calls = self._calls, deque()
        for function in calls:
            function()

    def _hang_up(self) -> None:
        if self.connection is not None and self.connection.is_open:
            self.connection.close()
        elif self._io is not None:
            self._io.stop()


def _place(parameters: pika.URLParameters) -> str:
    """A host as a person names it."""
    return f"{parameters.host}:{parameters.port}"


def _nothing() -> None:
    """Nobody has to be told."""


def _read_whole_frames(connection: pika.SelectConnection) -> None:
    """Let the transport read as much at once as the broker sends."""
    transport = getattr(connection, "_transport", None)
    if transport is not None and hasattr(transport, "_MAX_RECV_BYTES") and hasattr(transport, "_MAX_CONSUME_BYTES"):
        transport._MAX_RECV_BYTES = RECEIVE_BYTES  # noqa: SLF001 - tuning, and only where it fits
        transport._MAX_CONSUME_BYTES = 8 * RECEIVE_BYTES  # noqa: SLF001


def _reason(error: object) -> str:
    """The innermost reason of pika's nested errors, which often have no text of their own."""
    for _ in range(8):
        inner = getattr(error, "exception", None) or next(
            (arg for arg in getattr(error, "args", ()) if isinstance(arg, BaseException)), None
        )
        exceptions = getattr(error, "exceptions", None)
        if inner is None and exceptions:
            inner = exceptions[-1]
        if inner is None:
            break
        error = inner
    distrusted = tls_error(error) if isinstance(error, BaseException) else None
    if distrusted is not None:
        return distrusted
    text = getattr(error, "reply_text", None) or getattr(error, "strerror", None) or str(error)
    return str(text) or type(error).__name__
