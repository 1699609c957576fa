"""Bytes that nobody honest sends, thrown at every edge that reads them: the table of docs/explanation/threats.md.

    python benchmarks/fuzz.py [--examples 2000] [--only WORDS] [--out FILE]

Anything but an acceptance or a refusal with a name ends it with a traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import structlog

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hostile_codings
import hostile_files
import hostile_requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from measure import Table, machine
from served import Served
from server_rig import Rig

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing
from lorabbit.errors import Refused
from lorabbit.job.spec import JobSpec
from lorabbit.protocol import codec
from lorabbit.protocol.messages import FROM_CLIENT, FROM_SERVER
from lorabbit_server.aggregation.update_validation import UpdateTemplate

ACCEPTED = "accepted"
FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
CODERS = st.sampled_from([hostile_codings.INT8, hostile_codings.INT4, hostile_codings.TOP, hostile_codings.PACKED])
TYPES = st.sampled_from([model.type_name() for model in (*FROM_CLIENT, *FROM_SERVER)])
HEADERS = st.dictionaries(
    st.sampled_from(["sha256", "index", "task", "size", "epoch"]),
    st.none() | st.integers() | st.text(max_size=8) | st.booleans() | st.binary(max_size=4),
)
TEMPLATE = UpdateTemplate.of({"w": np.zeros(1, np.float32)})
Judge = Callable[[Any], Counter[str]]


@dataclass(frozen=True)
class Edge:
    """Something that reads what others wrote."""

    name: str
    thrown: st.SearchStrategy[Any]
    judge: Callable[[], Any]
    """A context that gives a function from what is thrown to the outcomes, by name; it raises what is no outcome."""
    share: float = 1.0
    """Of the examples: fewer where one takes long."""


@dataclass
class Found:
    """What came of one edge."""

    examples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: int = 0


class Broken(Exception):
    """An edge did what it never may; the text says what."""


def expect(holds: bool, what: str) -> None:  # noqa: FBT001 - a fact
    """Raise Broken where something does not hold."""
    if not holds:
        raise Broken(what)


def one(reason: str | None) -> Counter[str]:
    """The outcome of something that was judged once."""
    return Counter([reason or ACCEPTED])


@contextmanager
def message() -> Iterator[Judge]:
    """The reader of control messages."""

    def judge(thrown: tuple[str, bytes]) -> Counter[str]:
        try:
            codec.decode(*thrown)
        except Refused as why:
            return one(why.reason)
        return one(None)

    yield judge


@contextmanager
def file() -> Iterator[Judge]:
    """Admission of a tensor file."""
    yield lambda thrown: one(hostile_files.judged(hostile_files.written(*thrown), TEMPLATE))


@contextmanager
def flipped() -> Iterator[Judge]:
    """Admission of an honest coded update of which some bytes are others."""
    made = {}

    def judge(thrown: tuple[Any, list[tuple[int, int]]]) -> Counter[str]:
        coding, flips = thrown
        start = hostile_codings.START
        content = bytearray(made.setdefault(coding, hostile_codings.honest(coding, {"w": start["w"] + 1})))
        for place, value in flips:
            content[place % len(content)] = value
        return one(hostile_codings.judged(bytes(content), coding))

    yield judge


@contextmanager
def forged() -> Iterator[Judge]:
    """Admission of a coded update of forged parts."""

    def judge(parts: dict[str, Any]) -> Counter[str]:
        sections, index, claim = parts["sections"], json.dumps(parts["index"]).encode(), parts["claim"]
        told = {} if claim is None else {"lorabbit.coding": claim}
        content = hostile_codings.forged(sections, hostile_codings.PACKED, index=index, **told)
        return one(hostile_codings.judged(content, hostile_codings.PACKED))

    yield judge


@contextmanager
def server() -> Iterator[Judge]:
    """A server that leads and then runs a job, between whose clients and it everything is thrown."""

    def judge(thrown: list[tuple[tuple[str, bytes], dict[str, Any]]]) -> Counter[str]:
        with TemporaryDirectory() as folder:
            rig = Rig(Path(folder))
            rig.serve()
            rig.idle()
            for (type_name, body), headers in thrown:
                for key in (topology.up_key("host-1"), topology.data_key("host-1")):
                    rig.broker.send(Outgoing(topology.UP, key, type_name, body, headers))
            rig.start_clients()
            report = rig.run(JobSpec(name="job", clients=2, rounds=1))
            expect(report.status == "done", report.reason)
            refused = Counter(rig.service.refused)
            rig.service.close()
            return refused

    yield judge


@contextmanager
def door() -> Iterator[Judge]:
    """The HTTP interface's `/join`, over a real connection."""
    with TemporaryDirectory() as folder:
        served = Served(Path(folder), management_url=hostile_requests.NOWHERE, http_token=hostile_requests.OPERATOR)
        served.lead()

        def judge(thrown: tuple[bytes, str, str]) -> Counter[str]:
            body, kind, coding = thrown
            before = Counter(hostile_requests.refusals(served))
            answer = served.web.post("/join", content=body, headers={"Content-Type": kind, "Content-Encoding": coding})
            expect(answer.status_code in {400, 403} and list(answer.json()) == ["error"], answer.text)
            return Counter(hostile_requests.refusals(served)) - before

        try:
            yield judge
        finally:
            served.close()


VALUES = hostile_files.VALUES
METRICS = {"num_examples": 1, "facts": {}}
KNOWN = {"job": "j", "task": "t", "client": "c", "address": "a", "payload": None, "metrics": METRICS}
"""Of a message that is as it should be: every field but these may be 0 or left out."""
VALUES_OF_FOUR_BYTES = [struct.pack("<f", value) for value in (0.0, math.inf, math.nan, 3e38)]
MESSAGE = st.tuples(TYPES | st.sampled_from(["", "x"]), st.binary(max_size=200))
RIGHT_INDEX = [["w", "F32", [hostile_codings.COUNT]]]


@st.composite
def nearly(draw: st.DrawFn) -> tuple[str, bytes]:
    """A message that is right but for a field or two."""
    model = draw(st.sampled_from(FROM_CLIENT))
    fields = {name: field for name, field in model.model_fields.items() if field.is_required()}
    body = {name: KNOWN.get(name, 0) for name in fields}
    for name in draw(st.lists(st.sampled_from(sorted(model.model_fields)), max_size=2)):
        body[name] = draw(VALUES)
    return model.type_name(), json.dumps(body).encode()


@st.composite
def like_the_template(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A tensor file of one value, nearly as it is wanted."""
    dtype = draw(st.sampled_from(["F32", "F32", "F32", "F64", "I32"]))
    shape = draw(st.sampled_from([[1], [1], [1], [], [2], [1, 1]]))
    name = draw(st.sampled_from(["w", "w", "w", "v"]))
    data = draw(st.sampled_from(VALUES_OF_FOUR_BYTES) | st.binary(max_size=8))
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}, data


PARTS = st.fixed_dictionaries(
    {
        "sections": st.binary(max_size=300) | st.binary(min_size=104, max_size=104).map(hostile_codings.section),
        "index": st.just(RIGHT_INDEX) | st.just(RIGHT_INDEX) | hostile_codings.INDEXES,
        "claim": st.none() | st.none() | hostile_codings.CLAIMS,
    }
)
EDGES = (
    Edge("control message", MESSAGE | nearly() | nearly(), message),
    Edge(
        "tensor file: header and bytes",
        st.tuples(hostile_files.HEADERS, st.binary(max_size=40)) | like_the_template(),
        file,
    ),
    Edge("coded update: bytes flipped", st.tuples(CODERS, FLIPS), flipped),
    Edge("coded update: parts forged", PARTS, forged),
    Edge(
        "running server: messages and chunks",
        st.lists(st.tuples(MESSAGE | nearly(), HEADERS), min_size=1, max_size=6),
        server,
        0.05,
    ),
    Edge(
        "HTTP `/join`", st.tuples(hostile_requests.BODIES, hostile_requests.KINDS, hostile_requests.CODINGS), door, 0.5
    ),
)


def fuzz(edge: Edge, examples: int) -> Found:
    """Throw so many examples at an edge."""
    found = Found()
    with edge.judge() as judge:

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(edge.thrown)
        def throw(thrown: Any) -> None:  # noqa: ANN401 - whatever the edge reads
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
            found.outcomes += judge(thrown)
            found.slowest = max(found.slowest, time.perf_counter() - began)
            found.memory = max(found.memory, tracemalloc.get_traced_memory()[1] - before)
            found.examples += 1

        throw()
    return found


def row(edge: Edge, found: Found) -> dict[str, object]:
    """One row of the table."""
    return {
        "edge": edge.name,
        "examples": found.examples,
        "accepted": found.outcomes[ACCEPTED],
        "refused": ", ".join(f"`{name}` {number}" for name, number in found.outcomes.most_common() if name != ACCEPTED),
        "slowest, ms": 1000 * found.slowest,
        "most memory for one, MiB": found.memory / 2**20,
    }


def main() -> None:
    """Try every edge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="thrown at an edge; fewer at slow ones")
    parser.add_argument("--only", default="", help="edges with these words in their name")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    tracemalloc.start()
    rows = []
    for edge in EDGES:
        if arguments.only in edge.name:
            rows.append(row(edge, fuzz(edge, max(1, round(arguments.examples * edge.share)))))
            print(rows[-1], flush=True)
    Table("Malformed and hostile input at every edge that reads bytes", rows, machine()).show(arguments.out)


if __name__ == "__main__":
    main()
