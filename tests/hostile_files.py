"""Tensor files that nobody honest writes: what is in them, how they are written, and what admission says of one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import strategies as st

from lorabbit.errors import Refused
from lorabbit_server.aggregation.update_validation import ExpectedUpdate, check_update

SIDES = st.integers(-3, 3) | st.sampled_from([2**31, 2**48, 2**62, 2**63, 2**64, 10**30])
NAMES = st.text(max_size=12) | st.sampled_from(["../../etc/passwd", "\ud800", "__metadata__", "a" * 5000, "w"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_subnormal=False)
    | st.text(max_size=6)
    | st.sampled_from([2**64, -(2**70)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "BF16", "F8_E4M3", "F64", "PICKLE", ""]) | VALUES,
        "shape": st.lists(SIDES, max_size=70) | VALUES,
        "data_offsets": st.lists(SIDES, min_size=2, max_size=2) | VALUES,
    }
)
HEADERS = st.dictionaries(NAMES, ENTRIES | VALUES, max_size=3)


def written(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def judged(content, template=None):
    """The reason for which admission refuses a file, None where it passes; any other exception is a defect."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "u"
        path.write_bytes(content)
        try:
            check_update(path, ExpectedUpdate(template))
        except Refused as why:
            return why.reason
    return None
