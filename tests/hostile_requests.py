"""Requests that nobody honest sends to the HTTP interface, and what a server counted of them."""

from __future__ import annotations

import json

from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lorabbit.config.enrollment import password_hash

OPERATOR = "an operator's token"
TOKEN = "a token that nobody made"
WISH = {"token": TOKEN, "client": "site-a", "password_hash": password_hash("secret")}
NOWHERE = "http://user:secret@127.0.0.1:9/"
"""A management interface that is not there: nobody who is refused comes so far."""
ODD = st.sampled_from([2**64, "\ud800"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8)
VALUES = st.recursive(
    PLAIN | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NEARLY = st.dictionaries(st.sampled_from([*WISH, "more", "\ud800"]), VALUES, max_size=4).map(lambda more: WISH | more)
BODIES = st.binary(max_size=200) | (VALUES | NEARLY).map(lambda value: json.dumps(value).encode())
KINDS = st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", ""])
CODINGS = st.sampled_from(["", "gzip", "deflate", "zstd", "br"])
REQUESTS = st.tuples(BODIES, KINDS, CODINGS)


def refusals(served):
    """How often requests were refused so far, by reason."""
    text = served.measures.text(is_leading=True).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {s.labels["reason"]: int(s.value) for s in samples if s.name == "lorabbit_requests_refused_total"}
