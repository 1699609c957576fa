"""Rows from files: CSV, TSV, JSON, JSON lines and Parquet, plain or gzipped, and `.npz` images.

Every row keeps its line, so that later complaints can name it; what cannot be read at all is named
here: malformed JSON, a row of another width, text that is not UTF-8, a broken archive.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np

from lorabbit.errors import BadInput
from lorabbit_client.data.table import Table

_Rows: TypeAlias = "Iterator[tuple[int, dict[str, Any]]]"
"""(line, row)"""


def format_of(path: Path) -> str | None:
    """Return the format of a file by its suffix (``csv``, ``jsonl``, ...), None for one that is not read here."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    return suffix if suffix in _READERS or suffix in {"parquet", "npz"} else None


def read_table(path: Path) -> Table:
    """Read one file of rows; raises BadInput naming the file, and the line where there is one."""
    name = f"data file {path.name}"
    kind = format_of(path)
    if kind is None or kind == "npz":
        raise BadInput(f"{name}: unknown format; known are {', '.join((*_READERS, 'parquet'))}, also with .gz")
    try:
        if kind == "parquet":
            return _parquet(path, name)
        with _open_text(path) as file:
            return _collect(_READERS[kind](file, name), name)
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text: byte {error.object[error.start]:#04x}") from error
    except (OSError, EOFError) as error:
        raise BadInput(f"{name} cannot be read: {error}") from error


def read_images(path: Path) -> tuple[Table, Table | None]:
    """Read `x_train`, `y_train` and, where they exist, `x_test`, `y_test` of an `.npz` file as image and label.

    Images are uint8 (rows, height, width[, channels]); or, instead of `x_...`, JPEG files one behind
    the other in `jpeg_...` with `offsets_...`. Nothing pickled is read.
    """
    name = f"data file {path.name}"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{name} cannot be read: {error}") from error
    if "y_train" not in arrays or not {"x_train", "jpeg_train"} & arrays.keys():
        raise BadInput(f"{name} has no arrays x_train and y_train; it has {', '.join(arrays) or 'none'}")
    test = _image_split(arrays, "test", name) if "y_test" in arrays else None
    return _image_split(arrays, "train", name), test


def _image_split(arrays: dict[str, Any], split: str, name: str) -> Table:
    labels = arrays[f"y_{split}"]
    packed, offsets = arrays.get(f"jpeg_{split}"), arrays.get(f"offsets_{split}")
    if packed is None or offsets is None:
        images = arrays.get(f"x_{split}")
    else:
        images = np.stack([_decode(packed[a:b]) for a, b in pairwise(offsets)])
    if images is None or len(images) != len(labels):
        raise BadInput(f"{name}: y_{split} has {len(labels)} rows, x_{split} {0 if images is None else len(images)}")
    return Table(f"{name}, {split}", {"image": images, "label": labels})


def _decode(data: Any) -> Any:  # noqa: ANN401 - uint8 arrays
    from PIL import Image  # noqa: PLC0415 - only for packed images

    with Image.open(io.BytesIO(data.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _collect(rows: _Rows, name: str) -> Table:
    """Turn rows into columns; a field that a row lacks is None there."""
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    for line, row in rows:
        for field in row:
            if field not in columns:
                columns[field] = [None] * len(lines)
        for field, column in columns.items():
            column.append(row.get(field))
        lines.append(line)
    if not lines:
        raise BadInput(f"{name} has no rows")
    return Table(name, columns, lines)


def _json_lines(file: TextIO, name: str) -> _Rows:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(f"{name}, line {line}: not valid JSON ({error.msg} at column {error.colno})") from error
        yield line, _object(row, f"{name}, line {line}")


def _json(file: TextIO, name: str) -> _Rows:
    """Read a list of objects, or JSON lines under the other suffix."""
    text = file.read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(io.StringIO(text), name)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{name}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, f"{name}, row {number}")


def _object(row: Any, place: str) -> dict[str, Any]:  # noqa: ANN401 - whatever the file held
    if not isinstance(row, dict):
        raise BadInput(f"{place}: holds a {type(row).__name__}, expected an object with fields")
    return row


def _csv(file: TextIO, name: str) -> _Rows:
    return _separated(csv.DictReader(file, strict=True), name)


def _tsv(file: TextIO, name: str) -> _Rows:
    """Read tabs between fields; quotes are text, as in most published TSV files."""
    return _separated(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), name)


def _separated(reader: csv.DictReader[str], name: str) -> _Rows:
    csv.field_size_limit(sys.maxsize)
    width = len(reader.fieldnames or ())
    try:
        for row in reader:
            if None in row or None in row.values():
                held = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None) or ())
                raise BadInput(f"{name}, line {reader.line_num}: has {held} fields, the header {width}")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise BadInput(f"{name}, line {reader.line_num}: {error}") from error


def _parquet(path: Path, name: str) -> Table:
    """Read a Parquet file on this thread only (processes fork after this), into plain Python values."""
    import pyarrow as pa  # noqa: PLC0415 - heavy, and most jobs read no Parquet
    from pyarrow import parquet  # noqa: PLC0415

    try:
        table = parquet.ParquetFile(path).read(use_threads=False)
    except pa.ArrowInvalid as error:
        raise BadInput(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
    return Table(name, {column: table[column].to_pylist() for column in table.column_names})


_READERS: dict[str, Callable[[TextIO, str], _Rows]] = {
    "csv": _csv,
    "tsv": _tsv,
    "json": _json,
    "jsonl": _json_lines,
    "ndjson": _json_lines,
}
