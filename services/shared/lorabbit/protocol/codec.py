"""Messages to and from JSON.

A message from the wire is checked as a whole before any part of it is used.
"""

from __future__ import annotations

from pydantic import JsonValue, ValidationError

from lorabbit.errors import SHOWN, Refused
from lorabbit.protocol.messages import BY_TYPE, Message, Offer

MAX_MESSAGE_BYTES = 2**20
"""Control messages are small; anything larger is refused unread."""
MAX_NUMBER = 1e300
"""Of facts; their squares are no infinity in the sums of a few clients' weights."""


def encode(message: Message) -> bytes:
    """Write a message as JSON; its type name travels beside it."""
    return message.model_dump_json().encode()


def decode(type_name: str, body: bytes) -> Message:
    """Read a message of the type that its sender named.

    Raises Refused: ``unknown-type`` (also a newer version's), ``too-large``, ``malformed``.
    """
    model = BY_TYPE.get(type_name)
    if model is None:
        raise Refused("unknown-type", f"there is no message type {type_name[:100]!r} in this version")
    if len(body) > MAX_MESSAGE_BYTES:
        raise Refused("too-large", f"{type_name} has {len(body)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        message = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise Refused("malformed", f"{type_name}: {where[:SHOWN]}: {first['msg']}") from error
    if isinstance(message, Offer):
        _check_facts(message.metrics.facts)
    return message


def _check_facts(facts: JsonValue) -> None:
    """Refuse numbers that JSON cannot write again or that a float cannot hold; the parser bounds the depth."""
    if isinstance(facts, dict | list):
        for value in facts.values() if isinstance(facts, dict) else facts:
            _check_facts(value)
    elif isinstance(facts, int | float) and not abs(facts) < MAX_NUMBER:
        raise Refused("malformed", "a fact is no number of a size that a float holds")
