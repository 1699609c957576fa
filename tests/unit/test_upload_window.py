from lorabbit_server.transfer.uploads import MIN_UPLOADS, SLOW_MS, WINDOW_BYTES, UploadWindow

MIB = 2**20


def fill(window: UploadWindow, number: int, size: int, now_ms: int = 0) -> list[str]:
    return [name for n in range(number) if window.enter(name := f"p{n}", size, now_ms)]


def test_as_many_enter_as_their_bytes_allow() -> None:
    assert len(fill(UploadWindow(), 1000, MIB)) == WINDOW_BYTES // MIB


def test_a_few_enter_however_large_they_are() -> None:
    assert len(fill(UploadWindow(), 100, 10 * WINDOW_BYTES)) == MIN_UPLOADS


def test_who_leaves_makes_room_for_the_one_that_waits_longest() -> None:
    window = UploadWindow()
    inside = fill(window, 70, MIB)

    window.leave(inside[3])

    assert window.advance(0) == [f"p{len(inside)}"]
    assert window.advance(0) == []


def test_nobody_overtakes_those_who_wait() -> None:
    window = UploadWindow()
    fill(window, 70, MIB)
    window.leave("p0")

    assert not window.enter("late", 1, 0)
    assert window.advance(0)[0] == "p64"


def test_who_is_inside_may_ask_again_and_counts_once() -> None:
    window = UploadWindow()

    assert all(window.enter("same", WINDOW_BYTES // 4, 0) for _ in range(20))
    assert len(fill(window, 100, WINDOW_BYTES // 4)) == MIN_UPLOADS - 1


def test_who_is_slow_no_longer_holds_up_the_others() -> None:
    window = UploadWindow()
    fill(window, 3 * MIN_UPLOADS, WINDOW_BYTES)

    assert window.advance(SLOW_MS - 1) == []
    assert window.advance(SLOW_MS) == [f"p{n}" for n in range(MIN_UPLOADS, 2 * MIN_UPLOADS)]


def test_who_waits_and_is_forgotten_never_enters() -> None:
    window = UploadWindow()
    fill(window, MIN_UPLOADS + 2, WINDOW_BYTES)

    window.leave(f"p{MIN_UPLOADS}")
    window.leave("p0")

    assert window.advance(0) == [f"p{MIN_UPLOADS + 1}"]
