"""What every broker promises (see lorabbit.broker.base), held against memory and a real RabbitMQ."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from seen import Seen

from lorabbit.broker.base import Broker, Outgoing, Queue
from lorabbit.broker.memory import MemoryBroker
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.errors import BrokerBusy, LoRAbbitError

UP, DEAD = "test.up", "test.dead"


@pytest.fixture(params=["memory", pytest.param("rabbit", marks=pytest.mark.services)])
def make(request) -> Iterator[Callable[[], Broker]]:
    """Make brokers of one kind that all see the same messages."""
    opened: list[Broker] = []
    if request.param == "memory":
        only = MemoryBroker(user="guest")
        yield lambda: only
        return
    url = request.getfixturevalue("empty_rabbitmq_url")

    def make() -> Broker:
        opened.append(RabbitBroker(url, name="contract"))
        return opened[-1]

    yield make
    for broker in opened:
        broker.close()


@pytest.fixture
def broker(make) -> Broker:
    broker = make()
    broker.declare_exchange(UP)
    broker.declare_exchange(DEAD)
    return broker


@pytest.fixture
def empty(request, broker) -> Callable[[], None]:
    """Take everything from the broker, as a lost volume does."""
    if isinstance(broker, MemoryBroker):
        return broker.empty
    url = request.getfixturevalue("empty_rabbitmq_url")
    server = request.getfixturevalue("shared_rabbitmq")
    if not url.startswith(server.url):
        pytest.skip("a broker that was given by its URL keeps what it has")
    return lambda: server.empty(url)


def message(body: bytes = b"x", key: str = "q", exchange: str = "", **more) -> Outgoing:
    return Outgoing(exchange, key, "test.v1", body, **more)


def turn(broker: Broker) -> None:
    """Run the loop until everything posted so far has run."""
    broker.post(broker.stop)
    broker.run()


def test_a_message_arrives_as_it_was_sent(broker):
    broker.declare_queue(Queue("q", "quorum", ((UP, "c.*.ctl"),)))
    seen, answers = Seen(broker), Seen(broker)
    broker.subscribe("q", seen.add)

    broker.send(message(b"\x00body", "c.a.ctl", UP, headers={"sha256": "ab", "index": 7}), answers.add)

    seen.wait(1)
    answers.wait(1)
    assert answers == [None]
    delivery = seen[0]
    assert (delivery.queue, delivery.routing_key, delivery.type) == ("q", "c.a.ctl", "test.v1")
    assert (delivery.body, dict(delivery.headers)) == (b"\x00body", {"sha256": "ab", "index": 7})
    assert (delivery.sender, delivery.redelivered) == ("guest", False)


def test_messages_keep_their_order(broker):
    broker.declare_queue(Queue("q", "classic"))
    seen = Seen(broker)
    broker.subscribe("q", lambda delivery: (broker.ack(delivery), seen.add(delivery)), prefetch=4)

    for number in range(200):
        broker.send(message(b"%d" % number))

    seen.wait(200)
    assert seen.bodies == [b"%d" % number for number in range(200)]


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("c.*.ctl", "c.a.ctl", True),
        ("c.*.ctl", "c.a.data", False),
        ("c.*.ctl", "c.ctl", False),
        ("c.#", "c", True),
        ("#", "c.a.ctl", True),
        ("c.#.ctl", "c.a.b.ctl", True),
        ("c.a", "c.a", True),
    ],
)
def test_a_topic_exchange_routes_by_pattern(broker, pattern, key, matches):
    broker.declare_queue(Queue("q", "classic", ((UP, pattern),)))
    answers = Seen(broker)

    broker.send(message(key=key, exchange=UP), answers.add)

    answers.wait(1)
    assert (answers[0] is None) is matches


def test_a_message_for_nobody_is_answered_and_not_lost_silently(broker):
    answers = Seen(broker)

    broker.send(message(key="nobody"), answers.add)
    broker.send(message(key="nobody", exchange=UP), answers.add)

    answers.wait(2)
    assert all(isinstance(answer, LoRAbbitError) and not isinstance(answer, BrokerBusy) for answer in answers)


def test_a_message_to_an_exchange_that_is_not_declared_yet_is_to_be_sent_later(broker):
    answers, seen = Seen(broker), Seen(broker)
    broker.send(message(exchange="test.later"), answers.add)
    answers.wait(1)

    broker.declare_exchange("test.later")
    broker.declare_queue(Queue("q", "classic", (("test.later", "q"),)))
    broker.subscribe("q", seen.add)
    broker.send(message(exchange="test.later"), answers.add)

    seen.wait(1)
    answers.wait(2)
    assert isinstance(answers[0], BrokerBusy)
    assert answers[1] is None


def test_a_refused_message_does_not_keep_others_from_arriving(broker):
    broker.declare_queue(Queue("q", "classic"))
    seen, answers = Seen(broker), Seen(broker)
    broker.subscribe("q", lambda delivery: delivery.body in seen or seen.add(delivery.body), prefetch=100)

    for number in range(20):
        exchange = "test.missing" if number == 7 else ""
        broker.send(message(b"%d" % number, exchange=exchange), lambda e, n=number: answers.add((n, e)))

    answers.wait(20)
    seen.wait(19)
    assert [number for number, error in answers if error is not None] == [7]
    assert seen == [b"%d" % number for number in range(20) if number != 7]


def test_a_full_queue_says_busy(broker):
    broker.declare_queue(Queue("q", "classic", max_bytes=1000))
    answers = Seen(broker)

    for _ in range(6):
        broker.send(message(b"x" * 600), answers.add)
        answers.wait(len(answers) + 1)

    assert answers[0] is None
    assert isinstance(answers[-1], BrokerBusy)


def fill(broker):
    """Send to a small queue until it is full; the answers, of which the last is no."""
    broker.declare_queue(Queue("q", "classic", max_bytes=1000))
    answers = Seen(broker)
    while not isinstance(answers[-1] if answers else None, BrokerBusy):
        broker.send(message(b"x" * 600), answers.add)
        answers.wait(len(answers) + 1)
    return answers


def test_room_in_a_queue_lets_messages_in_again(broker):
    answers, seen = fill(broker), Seen(broker)
    accepted = len(answers) - 1

    broker.subscribe("q", lambda delivery: (broker.ack(delivery), seen.add(delivery)))
    seen.wait(accepted)
    broker.send(message(b"y" * 600), answers.add)

    answers.wait(accepted + 2)
    assert answers[-1] is None
    seen.wait(accepted + 1)


def test_a_message_for_a_full_queue_is_sent_until_it_is_taken(broker):
    answers, seen = fill(broker), Seen(broker)
    taken = Seen(broker)

    broker.send_with_retry(message(b"y" * 600), taken.add)
    broker.send(message(b"x" * 600), answers.add)  # is refused behind the other one, which so was refused as well
    answers.wait(len(answers) + 1)
    assert isinstance(answers[-1], BrokerBusy)
    assert taken == []
    broker.subscribe("q", lambda delivery: (broker.ack(delivery), seen.add(delivery)))

    taken.wait(1)
    assert taken == [None]
    seen.wait_until(lambda: b"y" * 600 in seen.bodies)


def test_what_nobody_listens_to_is_not_sent_again_and_again(broker):
    answers = Seen(broker)

    broker.send_with_retry(message(key="nowhere"), answers.add)

    answers.wait(1)
    assert isinstance(answers[0], LoRAbbitError)


def test_no_more_than_prefetch_is_handed_out(broker):
    broker.declare_queue(Queue("q", "quorum"))
    seen, answers = Seen(broker), Seen(broker)
    for number in range(5):
        broker.send(message(b"%d" % number), answers.add)
    answers.wait(5)

    broker.subscribe("q", seen.add, prefetch=2)

    seen.wait(2)
    broker.ack(seen[0])
    seen.wait(3)
    assert seen.bodies == [b"0", b"1", b"2"]


def test_what_a_reader_did_not_ack_goes_to_the_next(broker):
    broker.declare_queue(Queue("q", "classic"))
    first, second = Seen(broker), Seen(broker)
    subscription = broker.subscribe("q", first.add)
    for number in range(3):
        broker.send(message(b"%d" % number))
    first.wait(3)
    broker.ack(first[0])

    subscription.cancel()
    broker.subscribe("q", second.add)

    second.wait(2)
    assert second.bodies == [b"1", b"2"]
    assert all(delivery.redelivered for delivery in second)


def test_an_ack_after_leaving_does_nothing(broker):
    broker.declare_queue(Queue("q", "classic"))
    first, second = Seen(broker), Seen(broker)
    subscription = broker.subscribe("q", first.add)
    broker.send(message())
    first.wait(1)

    subscription.cancel()
    broker.ack(first[0])
    broker.reject(first[0])
    subscription.cancel()
    broker.subscribe("q", second.add)

    second.wait(1)
    assert (len(first.bodies), len(second.bodies)) == (1, 1)


def test_a_rejected_message_is_a_dead_letter(broker):
    broker.declare_queue(Queue("q", "quorum", ((UP, "k"),), dead_letter_exchange=DEAD))
    broker.declare_queue(Queue("dead", "classic", ((DEAD, "#"),)))
    seen, dead = Seen(broker), Seen(broker)
    broker.subscribe("q", seen.add)
    broker.subscribe("dead", dead.add)
    broker.send(message(b"poison", "k", UP, headers={"why": "x"}))
    seen.wait(1)

    broker.reject(seen[0])

    dead.wait(1)
    assert (dead[0].body, dead[0].routing_key, dict(dead[0].headers)) == (b"poison", "k", {"why": "x"})


def test_a_message_that_nobody_survives_is_a_dead_letter_in_the_end(broker):
    broker.declare_queue(Queue("q", "quorum", dead_letter_exchange=DEAD, delivery_limit=2))
    broker.declare_queue(Queue("dead", "classic", ((DEAD, "#"),)))
    dead, taken = Seen(broker), Seen(broker)
    broker.subscribe("dead", dead.add)
    broker.send(message(b"poison"))

    for times in (1, 2, 3):
        subscription = broker.subscribe("q", taken.add)
        taken.wait(times)
        subscription.cancel()

    dead.wait(1)
    assert (taken.bodies, dead.bodies) == ([b"poison"] * 3, [b"poison"])


def test_a_message_expires(broker):
    broker.declare_queue(Queue("q", "classic", dead_letter_exchange=DEAD))
    broker.declare_queue(Queue("dead", "classic", ((DEAD, "#"),)))
    dead, seen = Seen(broker), Seen(broker)
    broker.subscribe("dead", dead.add)

    broker.send(message(b"late", expires_ms=1))
    broker.after(0.05, lambda: broker.subscribe("q", seen.add))

    dead.wait(1)
    broker.send(message(b"fresh"))
    seen.wait(1)
    assert (dead.bodies, seen.bodies) == ([b"late"], [b"fresh"])


def test_a_subscription_waits_for_its_queue(broker):
    early, other = Seen(broker), Seen(broker)
    broker.declare_queue(Queue("other", "classic"))
    broker.subscribe("q", early.add)
    broker.subscribe("other", other.add)
    broker.send(message(key="other"))
    other.wait(1)

    broker.declare_queue(Queue("q", "classic"))
    broker.send(message(b"at last"))

    early.wait(1)
    assert early.bodies == [b"at last"]


def test_a_subscription_outlives_its_queue(broker):
    broker.declare_queue(Queue("q", "classic"))
    seen = Seen(broker)
    broker.subscribe("q", seen.add)
    broker.send(message(b"before"))
    seen.wait(1)

    broker.delete_queue("q")
    broker.declare_queue(Queue("q", "classic"))
    broker.send(message(b"after"))

    seen.wait(2)
    assert seen.bodies == [b"before", b"after"]


def test_each_reader_of_a_stream_sees_all_of_it(broker, make):
    broker.declare_queue(Queue("s", "stream"))
    answers = Seen(broker)
    for number in range(30):
        broker.send(message(b"%d" % number, "s", headers={"index": number}), answers.add)
    answers.wait(30)

    for reader in (broker, make(), make()):
        seen = Seen(reader)
        reader.read_stream("s", lambda d, seen=seen, reader=reader: (reader.ack(d), seen.add(d)), prefetch=4)
        seen.wait(30)

        assert seen.bodies == [b"%d" % number for number in range(30)]
        assert [delivery.headers["index"] for delivery in seen] == list(range(30))


def test_a_reader_may_begin_in_the_middle_of_a_stream(broker):
    broker.declare_queue(Queue("s", "stream"))
    answers = Seen(broker)
    for number in range(10):
        broker.send(message(b"%d" % number, "s"), answers.add)
    answers.wait(10)
    seen = Seen(broker)

    broker.read_stream("s", lambda delivery: (broker.ack(delivery), seen.add(delivery)), first=lambda: 7)

    seen.wait(3)
    assert seen.bodies == [b"7", b"8", b"9"]


def test_a_reader_that_begins_behind_the_end_of_a_stream_gets_what_comes_there(broker):
    broker.declare_queue(Queue("s", "stream"))
    answers, seen = Seen(broker), Seen(broker)
    broker.send(message(b"0", "s"), answers.add)
    answers.wait(1)
    broker.read_stream("s", lambda delivery: (broker.ack(delivery), seen.add(delivery)), first=lambda: 2)

    for number in range(1, 4):
        broker.send(message(b"%d" % number, "s"))

    seen.wait_until(lambda: b"3" in seen.bodies)
    assert seen.bodies[-2:] == [b"2", b"3"]


def test_a_reader_may_come_before_the_stream_and_before_its_end(broker):
    seen = Seen(broker)
    broker.read_stream("s", lambda delivery: (broker.ack(delivery), seen.add(delivery)))

    broker.declare_queue(Queue("s", "stream"))
    broker.send(message(b"first", "s"))
    seen.wait(1)
    broker.send(message(b"second", "s"))

    seen.wait(2)
    assert seen.bodies == [b"first", b"second"]


def test_a_stream_that_is_made_again_is_read_from_its_first_message(broker):
    broker.declare_queue(Queue("s", "stream"))
    seen = Seen(broker)
    broker.read_stream("s", lambda delivery: (broker.ack(delivery), seen.add(delivery)))
    broker.send(message(b"old", "s"))
    seen.wait(1)

    broker.delete_queue("s")
    broker.declare_queue(Queue("s", "stream"))
    broker.send(message(b"new", "s"))

    seen.wait(2)
    assert seen.bodies == [b"old", b"new"]


def test_declaring_and_deleting_twice_is_fine(broker):
    for _ in range(2):
        broker.declare_exchange(UP)
        broker.declare_queue(Queue("q", "quorum", ((UP, "a"), (UP, "b.#")), dead_letter_exchange=DEAD))
    for _ in range(2):
        broker.delete_queue("q")

    assert broker.health() is None


def test_a_declaration_that_cannot_hold_is_refused(broker):
    broker.declare_queue(Queue("q", "classic", max_bytes=1000))

    with pytest.raises(LoRAbbitError):
        broker.declare_queue(Queue("q", "classic", max_bytes=2000))
    with pytest.raises(LoRAbbitError):
        broker.declare_queue(Queue("other", "classic", (("test.missing", "k"),)))


def test_another_thread_wakes_the_loop(broker):
    ran_on = Seen(broker)

    poster = threading.Thread(target=lambda: broker.post(lambda: ran_on.add(threading.current_thread())))
    broker.post(poster.start)

    ran_on.wait(1)
    poster.join()
    assert ran_on == [threading.current_thread()]


def test_callbacks_run_on_the_loop_thread_and_never_inside_the_call(broker):
    broker.declare_queue(Queue("q", "classic"))
    seen = Seen(broker)
    inside = [True]
    broker.subscribe("q", lambda _: seen.add((inside[0], threading.current_thread())))

    broker.send(message(), lambda _: seen.add((inside[0], threading.current_thread())))
    inside[0] = False

    seen.wait(2)
    assert seen == [(False, threading.current_thread())] * 2


def test_timers_fire_in_order_unless_cancelled(broker):
    fired = Seen(broker)
    broker.after(0.02, lambda: fired.add("late"))
    broker.after(0.01, lambda: fired.add("never")).cancel()
    broker.after(0.0, lambda: fired.add("at once"))

    fired.wait(2)

    assert fired == ["at once", "late"]


def test_what_a_callback_raises_ends_the_loop(broker):
    def fail() -> None:
        raise KeyError("a bug")

    broker.post(fail)

    with pytest.raises(KeyError, match="a bug"):
        broker.run()
    turn(broker)


def test_a_loop_that_was_stopped_before_it_runs_returns(broker):
    ran = []
    broker.post(lambda: ran.append("late"))
    broker.stop()

    broker.run()

    assert ran in ([], ["late"])


def test_a_healthy_broker_has_no_trouble(broker):
    troubles = Seen(broker)

    def look():
        troubles.add(broker.health())
        broker.after(0.01, look)

    look()
    troubles.wait_until(lambda: None in troubles)

    assert troubles[-1] is None


def test_who_declared_is_told_that_a_broker_lost_everything_and_readers_go_on_once_it_is_declared_again(broker, empty):
    broker.declare_queue(Queue("q", "quorum", ((UP, "q"),)))
    told, seen, answers = Seen(broker), Seen(broker), Seen(broker)
    broker.subscribe("q", lambda delivery: (broker.ack(delivery), seen.add(delivery)))
    broker.send(message(b"before", "q", UP))
    seen.wait(1)
    broker.on_broker_reset(lambda: told.add("emptied"))

    empty()
    told.wait(1)
    broker.declare_exchange(UP)
    broker.declare_queue(Queue("q", "quorum", ((UP, "q"),)))
    broker.send(message(b"after", "q", UP), answers.add)

    seen.wait(2)
    answers.wait(1)
    assert (told, answers, seen.bodies) == (["emptied"], [None], [b"before", b"after"])
