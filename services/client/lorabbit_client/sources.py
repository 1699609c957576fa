"""Where rows come from."""

from __future__ import annotations

from pathlib import Path

from lorabbit.errors import BadInput
from lorabbit.jobspec import DataSpec
from lorabbit_client.stdlib_areas import AREAS
from lorabbit_client.stdlib_docs import load_docs
from lorabbit_client.tables import Source, Table


def read_source(spec: DataSpec, data_root: Path) -> Source:
    """Return the rows that a job's `data.source` names; raises BadInput when it cannot be read."""
    if spec.source == "stdlib-docs":
        return _stdlib_docs()
    raise BadInput(f"data.source: {spec.source!r} is neither a built-in dataset nor under {data_root}")


def _stdlib_docs() -> Source:
    docs = load_docs()
    columns = {
        "text": [doc.text for doc in docs],
        "label": [doc.label for doc in docs],
        "module": [doc.module for doc in docs],
        "name": [doc.name for doc in docs],
    }
    return Source(Table("data set stdlib-docs", columns), label_names=AREAS, group="module")
