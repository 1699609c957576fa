"""Crash points: named, known, each at one place, and without effect where nobody asks for them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from tree import ROOT

import lorabbit_client.__main__ as client
import lorabbit_server.__main__ as server
from lorabbit.errors import BadInput
from lorabbit.runtime import failpoints


@pytest.fixture(autouse=True)
def alive():
    yield
    failpoints.arm(None)


def test_every_point_is_at_one_place_of_the_side_it_names():
    sources = {path: path.read_text() for path in (ROOT / "services").rglob("*.py")}

    for point in failpoints.Failpoint:
        places = [
            path for path, text in sources.items() if re.search(rf"\bfailpoints\.Failpoint\.{point.name}\b", text)
        ]
        assert len(places) == 1, f"{point.title} is at {places}"
        assert f"lorabbit_{point.side}" in str(places[0]) or places[0].name in {
            "chunked_transfer.py",
            "stream_publisher.py",
        }


@pytest.mark.parametrize("main", [server.main, client.main])
def test_an_unknown_point_is_refused_at_the_start_with_the_known_ones(main, monkeypatch, capsys):
    monkeypatch.setenv("LORABBIT_CRASH_AT", "somewhere")

    code = main()

    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: environment variable LORABBIT_CRASH_AT: there is no crash point 'somewhere'; known")
    assert all(point.title in said for point in failpoints.Failpoint)
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("text", ["training:", "training:0", "training:-1", "training:two", "training:1:2"])
def test_a_number_of_passages_that_is_none_is_refused(text):
    with pytest.raises(BadInput, match="is no number of passages; write for example training:2"):
        failpoints.parse(text)


def test_a_process_dies_on_the_passage_it_was_told_and_prints_nothing_more():
    program = (
        "from lorabbit.runtime import failpoints\n"
        "failpoints.arm('training:2')\n"
        "failpoints.hit(failpoints.Failpoint.RESULT_WRITTEN)\n"
        "failpoints.hit(failpoints.Failpoint.TRAINING); print('once', flush=True)\n"
        "failpoints.hit(failpoints.Failpoint.TRAINING); print('twice', flush=True)\n"
    )

    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603

    assert (died.returncode, died.stdout) == (137, "once\n")


def test_nothing_happens_where_nobody_asked():
    program = (
        "from lorabbit.runtime import failpoints\n"
        "for point in failpoints.Failpoint: failpoints.hit(point)\n"
        "print('alive')\n"
    )

    lived = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603

    assert (lived.returncode, lived.stdout) == (0, "alive\n")
