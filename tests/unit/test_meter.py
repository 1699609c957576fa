"""The meter: sent twice counts twice, delivered twice counts once, and a restart changes nothing."""

from __future__ import annotations

import pytest

from lorabbit_server import meter as meter_module
from lorabbit_server.meter import Meter
from lorabbit_server.steps import Traffic


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traffic" / "job.jsonl"


def test_the_next_server_goes_on_with_what_was_counted(path):
    before = Meter(path)
    before.up("t", payload=100, overhead=7, message="a-0")
    before.down("t", 40)
    after = Meter(path)
    after.up("t", payload=50, overhead=5, message="a-1")

    assert after.read("t") == Traffic(150, 12, 40)


def test_what_is_delivered_again_after_a_restart_counts_once(path):
    Meter(path).up("t", payload=100, overhead=7, message="a-0")
    after = Meter(path)
    after.up("t", payload=100, overhead=7, message="a-0")

    assert after.read("t") == Traffic(100, 7, 0)


def test_what_is_sent_again_counts_again(path):
    meter = Meter(path)
    for message in ("a-0", "a-0+1", "b-0"):
        meter.up("t", payload=100, message=message)

    assert meter.read("t").bytes_up == 300


def test_a_line_that_a_power_cut_left_half_is_left_out(path):
    Meter(path).up("t", payload=100, message="a-0")
    with path.open("ab") as file:
        file.write(b'["t", 100, 0,')

    assert Meter(path).read("t").bytes_up == 100


def test_the_file_holds_no_more_than_the_tasks_under_way(path, monkeypatch):
    monkeypatch.setattr(meter_module, "STALE_LINES", 10)
    meter = Meter(path)
    for number in range(20):
        meter.up("old", payload=1, message=f"o-{number}")
        meter.up("new", payload=2, overhead=3, message=f"n-{number}")
    meter.keep({"new"})

    assert len(path.read_text().splitlines()) == 1
    after = Meter(path)
    assert (after.read("old"), after.read("new")) == (Traffic(), Traffic(40, 60, 0))
    after.up("new", payload=2, message="n-7")
    assert after.read("new").bytes_up == 40


def test_no_file_is_left_without_a_task(path):
    meter = Meter(path)
    meter.down("t", 1)
    meter.keep(())

    assert not path.exists()
