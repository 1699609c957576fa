"""Topic routing as RabbitMQ does it, for the broker in memory."""

from __future__ import annotations


class Exchange:
    """A topic exchange. Patterns without wildcards are found by key, however many clients there are."""

    def __init__(self) -> None:
        """Start without bindings."""
        self._exact: dict[str, set[str]] = {}
        self._patterns: dict[str, set[str]] = {}

    def bind(self, pattern: str, queue: str) -> None:
        """Route keys that match the pattern to a queue; idempotent."""
        table = self._patterns if {"*", "#"} & set(pattern.split(".")) else self._exact
        table.setdefault(pattern, set()).add(queue)

    def unbind(self, queue: str) -> None:
        """Forget every binding of a queue."""
        for table in (self._exact, self._patterns):
            for pattern in [pattern for pattern, queues in table.items() if queue in queues]:
                table[pattern].discard(queue)
                if not table[pattern]:
                    del table[pattern]

    def route(self, key: str) -> set[str]:
        """Names of the queues that a message with this routing key goes to."""
        queues = set(self._exact.get(key, ()))
        for pattern, bound in self._patterns.items():
            if topic_matches(pattern.split("."), key.split(".")):
                queues |= bound
        return queues


def topic_matches(pattern: list[str], key: list[str]) -> bool:
    """Match the words of a routing key: ``*`` stands for one word, ``#`` for any number of words."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(topic_matches(pattern[1:], key[start:]) for start in range(len(key) + 1))
    return bool(key) and pattern[0] in {"*", key[0]} and topic_matches(pattern[1:], key[1:])
