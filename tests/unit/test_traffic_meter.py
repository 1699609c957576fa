"""The meter: sent twice counts twice, delivered twice counts once, and a restart changes nothing."""

from __future__ import annotations

import pytest

from lorabbit.errors import Fenced
from lorabbit_server.artifacts.fenced_files import FencedFileWriter
from lorabbit_server.engine.transitions import PayloadTraffic
from lorabbit_server.transfer import traffic_meter as meter_module
from lorabbit_server.transfer.traffic_meter import TrafficMeter


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traffic" / "job.jsonl"


def test_the_next_server_goes_on_with_what_was_counted(path):
    before = TrafficMeter(path)
    before.up("t", payload=100, overhead=7, message="a-0")
    before.down("t", 40)
    after = TrafficMeter(path)
    after.up("t", payload=50, overhead=5, message="a-1")

    assert after.read("t") == PayloadTraffic(150, 12, 40)


def test_what_is_delivered_again_after_a_restart_counts_once(path):
    TrafficMeter(path).up("t", payload=100, overhead=7, message="a-0")
    after = TrafficMeter(path)
    after.up("t", payload=100, overhead=7, message="a-0")

    assert after.read("t") == PayloadTraffic(100, 7, 0)


def test_what_is_sent_again_counts_again(path):
    meter = TrafficMeter(path)
    for message in ("a-0", "a-0+1", "b-0"):
        meter.up("t", payload=100, message=message)

    assert meter.read("t").bytes_up == 300


def test_a_line_that_a_power_cut_left_half_is_left_out(path):
    TrafficMeter(path).up("t", payload=100, message="a-0")
    with path.open("ab") as file:
        file.write(b'["t", 100, 0,')

    assert TrafficMeter(path).read("t").bytes_up == 100


def test_what_two_servers_counted_of_one_message_counts_once_for_the_next_one(path):
    asleep, second = TrafficMeter(path), TrafficMeter(path)
    for meter in (asleep, second):
        meter.up("t", payload=100, message="a-0")
        meter.up("u", payload=10, message="a-0")

    after = TrafficMeter(path)
    assert (after.read("t").bytes_up, after.read("u").bytes_up) == (100, 10)


def test_memory_and_file_do_not_grow_with_the_messages_of_a_task(path, monkeypatch):
    monkeypatch.setattr(meter_module, "COMPACT_LINES", 10)
    monkeypatch.setattr(meter_module, "MAX_IDS", 5)
    meter = TrafficMeter(path)
    for number in range(200):
        meter.up("old", payload=1, message=f"o-{number}")
        meter.up("new", payload=2, overhead=3, message=f"n-{number}")
        assert len(meter._seen) <= 5
        assert len(path.read_text().splitlines()) <= 2 + 10

    for each in (meter, TrafficMeter(path)):
        each.up("new", payload=2, message="n-199")
        each.up("old", payload=1, message="o-198")
        assert (each.read("old"), each.read("new")) == (PayloadTraffic(200, 0, 0), PayloadTraffic(400, 600, 0))


def test_tasks_that_are_over_are_forgotten_with_their_ids(path):
    meter = TrafficMeter(path)
    meter.up("old", payload=1, message="o")
    meter.up("new", payload=2, message="n")
    meter.retain({"new"})

    assert (meter.read("old"), meter.read("new")) == (PayloadTraffic(), PayloadTraffic(2, 0, 0))
    assert set(meter._seen) == {("new", "n")}


def test_a_server_that_was_replaced_leaves_the_file_of_the_next_one(path):
    def fence():
        raise Fenced("another server leads")

    asleep = TrafficMeter(path, FencedFileWriter(durable=False, fence=fence))
    TrafficMeter(path).up("t", payload=100)
    before = path.read_bytes()

    with pytest.raises(Fenced):
        asleep.retain(())

    assert path.read_bytes() == before


def test_no_file_is_left_without_a_task(path):
    meter = TrafficMeter(path)
    meter.down("t", 1)
    meter.retain(())

    assert not path.exists()


def test_a_message_is_counted_by_a_line_of_its_own_until_the_file_is_compacted(path):
    meter = TrafficMeter(path)
    for number in range(3):
        meter.up("t", payload=1, message=f"a-{number}")

    assert len(path.read_text().splitlines()) == 3
