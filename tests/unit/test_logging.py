"""Logs are lines of one event name plus fields."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from lorabbit.config.logging import configure
from lorabbit.errors import BadInput


@pytest.fixture(autouse=True)
def unconfigured():
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_hold_event_level_time_and_fields():
    stream = io.StringIO()
    configure("INFO", "json", stream=stream)

    structlog.get_logger().info("round-closed", job="j", round=3)

    (line,) = lines(stream)
    assert (line["event"], line["level"], line["job"], line["round"]) == ("round-closed", "info", "j", 3)
    assert line["timestamp"].endswith("Z")


def test_what_is_bound_stands_on_every_line():
    stream = io.StringIO()
    configure("INFO", "json", stream=stream)

    with structlog.contextvars.bound_contextvars(job="j"):
        structlog.get_logger().info("one")
    structlog.get_logger().info("two")

    assert ["job" in line for line in lines(stream)] == [True, False]


def test_lines_below_the_level_are_dropped():
    stream = io.StringIO()
    configure("warning", "json", stream=stream)

    structlog.get_logger().info("one")
    structlog.get_logger().warning("two")

    assert [line["event"] for line in lines(stream)] == ["two"]


def test_what_is_no_terminal_gets_json_unless_text_is_asked_for():
    automatic, text = io.StringIO(), io.StringIO()

    configure("INFO", "auto", stream=automatic)
    structlog.get_logger().info("one")
    configure("INFO", "text", stream=text)
    structlog.get_logger().info("one", job="j")

    assert lines(automatic)[0]["event"] == "one"
    assert "one" in text.getvalue()
    assert "job=j" in text.getvalue()
    assert "\x1b" not in text.getvalue()


def test_an_exception_is_part_of_its_line():
    stream = io.StringIO()
    configure("INFO", "json", stream=stream)

    try:
        int("no luck")
    except ValueError:
        structlog.get_logger().exception("failed")

    (line,) = lines(stream)
    assert "ValueError: invalid literal" in line["exception"]


@pytest.mark.parametrize(("level", "style"), [("LOUD", "json"), ("INFO", "xml")])
def test_a_wrong_setting_is_named(level, style):
    with pytest.raises(BadInput, match=r"LOUD|xml"):
        configure(level, style)
