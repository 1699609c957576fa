"""One test that checks a rule on many files or cases.

`@for_each(path=PATHS)` runs the body of a test once for each path, inside one test. A parametrized test would cost
collection time for every pair of rule and file, in every worker of every run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from itertools import combinations
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def for_each(**items: Collection[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test once for each item and report every item that failed.

    Args:
        items: One keyword: the name of the test's argument, and its values. A tuple of values needs a tuple of names
            joined by `__`, such as `values__text`.

    Returns:
        The decorator. The decorated test asks for the other arguments as fixtures, once for all items.
    """
    ((joined, values),) = items.items()
    names = joined.split("__")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def looped(**fixtures: Any) -> None:
            assert values, f"nothing to check: no {joined}"
            failures = []
            for value in values:
                given = dict(zip(names, value if len(names) > 1 else (value,), strict=True))
                try:
                    test(**given, **fixtures)
                except Exception as failure:  # noqa: BLE001 - reported for the item
                    failure.add_note(f"for {joined} = {value}")
                    failures.append(failure)
            if failures:
                raise ExceptionGroup(f"{len(failures)} of {len(values)} {joined} failed", failures)

        signature = inspect.signature(test)
        kept = [parameter for name, parameter in signature.parameters.items() if name not in names]
        looped.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return looped

    return decorate


def tiered(values: Iterable[Any], *, fast: Collection[Any] = (), slow: Collection[Any] = ()) -> list[ParameterSet]:
    """Parameters of a test, each in a tier: `make test`, `.ci/run` or `make test-all`.

    Args:
        values: All values; a value may be a tuple of arguments.
        fast: Values that `make test` runs.
        slow: Values that `.ci/run` runs as well. All others are left to `make test-all`.
    """
    values = [*values]
    unknown = [value for value in (*fast, *slow) if value not in values]
    assert not unknown, f"not among the values: {unknown}"

    def tier(value: Any) -> Any:
        return () if value in fast else pytest.mark.slow if value in slow else pytest.mark.thorough

    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=tier(value)) for value in values]


def pairwise(cases: Collection[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return cases in which every pair of values that occurs together in some case still occurs together.

    Args:
        cases: All combinations of the values of two or more factors that are possible.

    Returns:
        A subset, chosen greedily: each time the case with the most pairs that are not covered yet.
    """

    def pairs(case: tuple[Any, ...]) -> set[Any]:
        return set(combinations(enumerate(case), 2))

    left = set().union(*map(pairs, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen
