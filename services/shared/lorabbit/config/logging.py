"""Logs: one event name plus fields, as JSON lines or as text for people.

Nothing is set up when this module is imported; a process calls `configure` once, at its start.
Fields bound with `structlog.contextvars` (job, round, client) stand on every line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

import structlog

from lorabbit.errors import BadInput

LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING, "ERROR": logging.ERROR}
FORMATS = ("auto", "json", "text")


def configure(level: str = "INFO", log_format: str = "auto", *, stream: TextIO | None = None) -> None:
    """Send logs to a stream (standard error), as text on a terminal and as JSON elsewhere unless told otherwise."""
    number = LEVELS.get(level.upper())
    if number is None:
        raise BadInput(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    if log_format not in FORMATS:
        raise BadInput(f"log format {log_format!r} is not one of {', '.join(FORMATS)}")
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    as_text = log_format == "text" or (log_format == "auto" and is_terminal)
    render: Callable[..., Any] = (
        structlog.dev.ConsoleRenderer(colors=is_terminal) if as_text else structlog.processors.JSONRenderer()
    )
    before: list[Any] = [] if as_text else [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if as_text else "iso", utc=not as_text),
            structlog.processors.StackInfoRenderer(),
            *before,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=max(number, logging.WARNING), stream=stream, format="%(name)s: %(message)s", force=True)
