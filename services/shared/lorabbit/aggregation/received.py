"""A round's updates, walked as often as a fold needs them, without holding a file open for each of many clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from lorabbit.errors import Refused
from lorabbit.types import ClientUpdate

HELD = 64
"""Updates whose files stay open between walks; of more clients each walk opens them anew."""


class Received(Iterable[ClientUpdate]):
    """The updates of one round, all of the same names, in the order given."""

    def __init__(
        self,
        updates: Iterable[ClientUpdate],
        check: Callable[[ClientUpdate], None] | None = None,
        weigh: Callable[[ClientUpdate], float] = lambda update: update.num_examples,
    ) -> None:
        """Walk once, check and weigh each; raises Refused ("names") for unlike ones, ValueError where are none."""
        self._source: Iterable[ClientUpdate] = list(updates) if isinstance(updates, Iterator) else updates
        self.names: tuple[str, ...] = ()
        self.weights: list[float] = []
        held: list[ClientUpdate] = []
        for update in self._source:
            if check is not None:
                check(update)
            if not self.weights:
                self.names = tuple(update.tensors)
            elif update.tensors.keys() != set(self.names):
                raise Refused("names", "updates of one round hold different tensors")
            self.weights.append(float(weigh(update)))
            if len(held) <= HELD:
                held.append(update)
        if not self.weights:
            raise ValueError("a round needs at least one update")
        if len(held) <= HELD:
            self._source = held

    def __iter__(self) -> Iterator[ClientUpdate]:
        """Walk again."""
        return iter(self._source)
