"""The rows of the failure matrix: killed, cut, frozen or full, and the run ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos.faults import NotHere
from chaos.play import Theatre
from chaos.rows import ALWAYS, ROWS, Row

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    made = Theatre(ROWS)
    yield made
    made.close()


def marked(row: Row) -> object:
    return pytest.param(row, id=row.name, marks=() if row.name in ALWAYS else pytest.mark.thorough)


@pytest.mark.parametrize("row", [marked(row) for row in ROWS])
def test_a_run_ends_as_if_nothing_had_happened(theatre: Theatre, row: Row) -> None:
    try:
        verdict = theatre.play(row)
    except NotHere as why:
        pytest.skip(str(why))

    assert verdict.differences == []
    assert verdict.same_adapter
