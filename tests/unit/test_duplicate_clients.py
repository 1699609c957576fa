"""Two processes at one address are told from one that was started again."""

from __future__ import annotations

import pytest

from lorabbit_server.clients.addresses import MAX_PROCESSES, DuplicateClientDetector


@pytest.fixture
def occupancy() -> DuplicateClientDetector:
    return DuplicateClientDetector()


def told(occupancy: DuplicateClientDetector, processes: str) -> list[bool]:
    return [occupancy.observe("jetson", process) for process in processes]


def test_a_process_that_was_started_again_and_again_is_alone(occupancy: DuplicateClientDetector) -> None:
    assert told(occupancy, "aaabbbccc") == [False] * 9


def test_whoever_came_second_is_told_to_leave_as_soon_as_the_first_speaks_again_and_until_it_is_gone(
    occupancy: DuplicateClientDetector,
) -> None:
    assert told(occupancy, "abbabab") == [False, False, False, False, True, False, True]


def test_of_three_the_first_stays(occupancy: DuplicateClientDetector) -> None:
    assert told(occupancy, "abcabc") == [False, False, False, False, True, True]


def test_one_that_a_supervisor_starts_again_is_told_again(occupancy: DuplicateClientDetector) -> None:
    assert told(occupancy, "abab") == [False, False, False, True]
    assert occupancy.remove_process("jetson", "b")
    assert told(occupancy, "acac") == [False, False, False, True]


def test_a_goodbye_of_the_only_one_leaves_nobody(occupancy: DuplicateClientDetector) -> None:
    told(occupancy, "ab")

    assert not occupancy.remove_process("jetson", "b")
    assert told(occupancy, "a") == [False]


def test_a_goodbye_of_the_first_leaves_the_second_in_its_place(occupancy: DuplicateClientDetector) -> None:
    told(occupancy, "abab")

    assert occupancy.remove_process("jetson", "a")
    assert told(occupancy, "bb") == [False, False]
    assert not occupancy.remove_process("jetson", "b")


def test_a_goodbye_of_a_former_process_that_comes_late_leaves_the_present_one_in_its_place(
    occupancy: DuplicateClientDetector,
) -> None:
    told(occupancy, "b")

    assert occupancy.remove_process("jetson", "a")
    assert told(occupancy, "bb") == [False, False]
    assert not occupancy.remove_process("jetson", "b")


def test_a_goodbye_of_somebody_unknown_is_taken_as_that_of_the_only_one(occupancy: DuplicateClientDetector) -> None:
    assert not occupancy.remove_process("jetson", "")


def test_addresses_do_not_meet(occupancy: DuplicateClientDetector) -> None:
    told(occupancy, "ab")

    assert not occupancy.observe("nano", "b")
    assert not occupancy.observe("nano", "a")


def test_a_client_that_calls_itself_something_else_each_time_costs_no_memory(
    occupancy: DuplicateClientDetector,
) -> None:
    for number in range(100):
        occupancy.observe("jetson", str(number))

    assert occupancy.observe("jetson", str(100 - MAX_PROCESSES)) is False
    assert occupancy.observe("jetson", str(99 - MAX_PROCESSES)) is False, "it was forgotten, and is new"
