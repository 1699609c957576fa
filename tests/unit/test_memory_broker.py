"""What the broker in memory promises beyond the contract: a clock of one's own, broken connections, expiring queues."""

import pytest

from lorabbit.broker.base import Outgoing, Queue
from lorabbit.broker.memory import MemoryBroker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def broker(clock):
    return MemoryBroker(clock=clock)


def message(body=b"x", key="q", **more):
    return Outgoing("", key, "test.v1", body, **more)


def test_timers_follow_the_given_clock(broker, clock):
    fired = []
    broker.after(10, lambda: fired.append(10))
    broker.after(5, lambda: fired.append(5))

    broker.run_until_idle()
    assert fired == []
    clock.now = 7
    broker.run_until_idle()
    assert fired == [5]
    clock.now = 10
    broker.run_until_idle()

    assert fired == [5, 10]


def test_a_timer_that_sets_itself_again_fires_once_at_one_time(broker, clock):
    fired = []

    def tick():
        fired.append(clock.now)
        broker.after(1, tick)

    broker.after(1, tick)
    for clock.now in (1, 2):
        broker.run_until_idle()

    assert fired == [1, 2]


def test_a_message_expires_by_the_given_clock(broker, clock):
    seen = []
    broker.declare_queue(Queue("q", "classic"))
    broker.send(message(b"late", expires_ms=1000))
    broker.send(message(b"in time", expires_ms=3000))

    clock.now = 2
    broker.subscribe("q", lambda delivery: seen.append(delivery.body))
    broker.run_until_idle()

    assert seen == [b"in time"]


def test_a_broken_connection_brings_back_what_was_not_acknowledged_in_its_order(broker):
    seen = []
    broker.declare_queue(Queue("q", "classic"))
    broker.subscribe("q", seen.append)
    for number in range(4):
        broker.send(message(b"%d" % number))
    broker.run_until_idle()
    broker.ack(seen[1])

    broker.reconnect()
    for delivery in seen[:4]:
        broker.ack(delivery)
    broker.run_until_idle()

    assert [(delivery.body, delivery.redelivered) for delivery in seen[4:]] == [
        (b"0", True),
        (b"2", True),
        (b"3", True),
    ]


def test_a_broken_connection_starts_streams_over(broker):
    seen = []
    broker.declare_queue(Queue("s", "stream"))
    broker.read_stream("s", lambda delivery: (broker.ack(delivery), seen.append(delivery.body)))
    broker.send(message(b"a", "s"))
    broker.send(message(b"b", "s"))
    broker.run_until_idle()

    broker.reconnect()
    broker.run_until_idle()

    assert seen == [b"a", b"b", b"a", b"b"]


def test_readers_of_a_queue_take_turns(broker):
    first, second = [], []
    broker.declare_queue(Queue("q", "classic"))
    broker.subscribe("q", lambda delivery: first.append(delivery.body))
    broker.subscribe("q", lambda delivery: second.append(delivery.body))

    for number in range(4):
        broker.send(message(b"%d" % number))
    broker.run_until_idle()

    assert (first, second) == ([b"0", b"2"], [b"1", b"3"])


def test_a_queue_that_nobody_reads_is_deleted_and_one_that_is_read_stays(broker, clock):
    answers = []
    for name in ("unused", "used", "left"):
        broker.declare_queue(Queue(name, "classic", expires_ms=1000))
    broker.subscribe("used", print)
    reader = broker.subscribe("left", print)

    clock.now = 5
    broker.run_until_idle()
    reader.cancel()
    clock.now = 5.5
    broker.run_until_idle()
    for name in ("unused", "used", "left"):
        broker.send(message(key=name), answers.append)
    broker.run_until_idle()
    assert [answer is None for answer in answers] == [False, True, True]
    clock.now = 6
    broker.run_until_idle()
    broker.send(message(key="left"), answers.append)
    broker.run_until_idle()

    assert answers[-1] is not None


def test_a_closed_broker_has_forgotten_everything(broker):
    answers = []
    broker.declare_queue(Queue("q", "classic"))

    broker.close()
    broker.send(message(), answers.append)
    broker.run_until_idle()

    assert answers[0] is not None
    assert broker.health() is None
