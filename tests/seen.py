"""What callbacks of a broker saw, and the loop that runs until there is enough of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from lorabbit.broker.base import Broker, Delivery

T = TypeVar("T")
WATCHDOG_SECONDS = 60.0


class Seen(list[T], Generic[T]):
    """A list that callbacks `add` to; `wait` runs the loop until it is long enough."""

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self.broker = broker
        self.is_enough: Callable[[], bool] = lambda: False

    def add(self, item: T) -> None:
        self.append(item)
        if self.is_enough():
            self.broker.stop()

    def wait(self, wanted: int) -> None:
        self.wait_until(lambda: len(self) >= wanted)

    def wait_until(self, is_enough: Callable[[], bool]) -> None:
        if not is_enough():
            self.is_enough = is_enough
            watchdog = self.broker.after(WATCHDOG_SECONDS, self.broker.stop)
            self.broker.run()
            watchdog.cancel()
            self.is_enough = lambda: False
        assert is_enough(), f"not enough after {WATCHDOG_SECONDS} s: {list(self)[-5:]}"

    @property
    def bodies(self) -> list[bytes]:
        return [item.body for item in self if isinstance(item, Delivery)]
