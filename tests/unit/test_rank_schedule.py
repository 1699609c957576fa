from itertools import groupby

import pytest

from lorabbit.methods.components.rank_schedule import RankSchedule, holds

CUBIC = [32] * 6 + [29, 27, 25, 23, 21, 19, 17, 16, 14, 13, 12, 11, 10, 9, 8, 8, 7, 6, 6, 5, 5, 5, 5] + [4] * 18
SMOOTH = ["cubic", "geometric", "linear", "cosine"]


def golden(shape, **more):
    return RankSchedule(shape, rounds=50, start=3, highest=32, lowest=4, heat=5, cool=10, **more)


def ranks(schedule):
    return [schedule.rank(t) for t in range(schedule.start, schedule.rounds)]


def test_U1_the_cubic_schedule_is_the_golden_vector():
    assert ranks(golden("cubic")) == CUBIC
    assert sum(CUBIC) == 565


@pytest.mark.parametrize(("shape", "total"), [("geometric", 647), ("linear", 792)])
def test_U1_other_schedules_have_the_golden_sums(shape, total):
    assert sum(ranks(golden(shape))) == total


def test_U1_a_ladder_rounds_up_to_the_golden_steps():
    steps = ranks(golden("cubic", ladder=(4, 8, 16, 32)))

    assert [(rank, len(list(group))) for rank, group in groupby(steps)] == [(32, 13), (16, 7), (8, 9), (4, 18)]


@pytest.mark.parametrize("shape", SMOOTH)
def test_U1_a_schedule_never_rises_and_ends_where_it_should(shape):
    steps = ranks(golden(shape))

    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (32, 4)


def test_U1_there_is_no_rank_before_the_second_stage():
    assert [golden("cubic").rank(t) for t in range(3)] == [None, None, None]


def test_U1_phases_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="leave none to fall in"):
        RankSchedule("cubic", rounds=10, start=1, highest=8, lowest=2, heat=5, cool=4)


def test_U1_a_lowest_rank_above_the_highest_is_refused():
    with pytest.raises(ValueError, match="above r_max"):
        RankSchedule("cubic", rounds=10, start=1, highest=2, lowest=8, heat=1, cool=1)


def test_the_reverse_schedule_is_the_cubic_one_backwards():
    assert ranks(golden("reverse")) == CUBIC[::-1]


def test_an_explicit_schedule_holds_its_last_rank():
    assert ranks(golden("explicit", explicit=(16, 8)))[:4] == [16, 8, 8, 8]


def test_an_explicit_rank_outside_the_bounds_is_refused():
    with pytest.raises(ValueError, match="not between"):
        golden("explicit", explicit=(64,))


@pytest.mark.parametrize("shape", ["cubic", "constant", "reverse"])
def test_a_list_of_ranks_that_no_schedule_reads_is_refused(shape):
    with pytest.raises(ValueError, match=f"{shape!r} reads no list of ranks"):
        golden(shape, explicit=(16, 8))


@pytest.mark.parametrize(("shape", "more"), [("constant", {}), ("explicit", {"explicit": (16, 8)})])
def test_a_ladder_under_ranks_that_do_not_fall_by_a_formula_is_refused(shape, more):
    with pytest.raises(ValueError, match="leave ladder out"):
        golden(shape, ladder=(4, 32), **more)


def test_a_ladder_without_the_highest_rank_is_refused():
    with pytest.raises(ValueError, match="ladder"):
        golden("cubic", ladder=(4, 16))


@pytest.mark.parametrize(("rounds", "expected"), [(47, (5, 10)), (4, (1, 1)), (3, (0, 0)), (1, (0, 0))])
def test_holds_are_a_tenth_and_a_fifth_of_a_stage_that_is_long_enough(rounds, expected):
    assert holds(rounds, None, None) == expected
