"""Sources: what is read from files and folders, and the sentence for each thing that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.file_readers import read_table
from lorabbit_client.data.sources import read_source
from lorabbit_client.data.table import LabelTable, Source, find_labels
from lorabbit_client.tasks.registry import TASKS

ROWS = [{"text": "good film", "label": "yes"}, {"text": "bad film", "label": "no"}]
TEXT = TASKS["text-classification"]


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parse(source: Source, **spec: object) -> list[int]:
    data = DataSpec.model_validate(spec)
    labels = TEXT.labels(source, data)
    return TEXT.parse(source.train, labels, data).classes.tolist()


def test_the_same_rows_come_from_every_format(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", list(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text('text,label\n"good film",yes\nbad film,no\n')
    (tmp_path / "a.tsv").write_text("text\tlabel\ngood film\tyes\nbad film\tno\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    _write_parquet(tmp_path / "a.parquet")

    for path in sorted(tmp_path.iterdir()):
        source = read_source(DataSpec(source=path.name), tmp_path)
        assert source.train.columns["text"] == ["good film", "bad film"], path.name
        assert parse(source) == [1, 0], path.name


def _write_parquet(path: Path) -> None:
    parquet.write_table(pa.table({"text": ["good film", "bad film"], "label": ["yes", "no"]}), path)


def test_a_folder_gives_train_and_test_by_name_and_labels_from_dataset_json(tmp_path: Path):
    folder = tmp_path / "films"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"text": "good", "label": 1}])
    write_lines(folder / "dev.jsonl", [{"text": "so so", "label": 0}])
    write_lines(folder / "test.jsonl", [{"text": "bad", "label": 0}, {"text": "fine", "label": 1}])
    (folder / "dataset.json").write_text(json.dumps({"label_names": ["negative", "positive"]}))

    source = read_source(DataSpec(source="films"), tmp_path)

    assert source.label_names == ("negative", "positive")
    assert len(source.train) == 1
    assert source.test is not None
    assert source.test.columns["text"] == ["bad", "fine"]


def test_parts_of_a_split_are_joined(tmp_path: Path):
    write_lines(tmp_path / "train-00000-of-00002.jsonl", [{"text": "one", "label": 0}])
    write_lines(tmp_path / "train-00001-of-00002.jsonl", [{"text": "two", "label": 1}])

    source = read_source(DataSpec(source=str(tmp_path)), Path())

    assert source.train.columns["text"] == ["one", "two"]


def test_images_come_from_npz_with_their_own_test_split(tmp_path: Path):
    images, labels = np.zeros((4, 5, 6), dtype=np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "marks.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])

    source = read_source(DataSpec(source="marks.npz"), tmp_path)

    assert len(source.train) == 4
    assert source.test is not None
    assert len(source.test) == 2


def test_digits_come_as_gray_bytes():
    source = read_source(DataSpec(source="digits"), Path())

    images = source.train.columns["image"]
    assert isinstance(images, np.ndarray)
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 255


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', r"data file x.jsonl, line 2: field 'label' is missing; .* text"),
        ('{"text": "a", "label": 1}\n\n{"text": " ", "label": 1}\n', r"x.jsonl, line 3: field 'text' is empty"),
        ('{"text": "a", "label": 1}\n{"text": 7, "label": 1}\n', r"line 2: field 'text' holds 7, expected a text"),
        ('{"text": "a", "label": 1}\n{"text": "b", \n', r"line 2: not valid JSON \(.* at column \d+\)"),
        ('{"text": "a", "label": 1}\n["b", 1]\n', r"line 2: holds a list, expected an object"),
        ('{"text": "a", "topic": 1}\n', r"x.jsonl has no field 'label'; it has text, topic"),
        ("", r"x.jsonl has no rows"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "x.jsonl").write_text(text)

    with pytest.raises(BadInput, match=sentence):
        parse(read_source(DataSpec(source="x.jsonl"), tmp_path))


def test_a_label_outside_of_the_table_is_named(tmp_path: Path):
    write_lines(tmp_path / "x.jsonl", [*ROWS, {"text": "odd film", "label": "maybe"}])
    source = read_source(DataSpec(source="x.jsonl"), tmp_path)

    with pytest.raises(BadInput, match=r"x.jsonl, line 3: label 'maybe' is not in the label table \(no, yes\)"):
        parse(source, labels=["no", "yes"])


def test_a_given_field_that_is_absent_is_named_with_those_that_exist(tmp_path: Path):
    write_lines(tmp_path / "x.jsonl", list(ROWS))
    source = read_source(DataSpec(source="x.jsonl"), tmp_path)

    with pytest.raises(BadInput, match=r"data.fields.text: data file x.jsonl has no field 'body'; it has text, label"):
        parse(source, fields={"text": "body"})


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.csv", b"text,label\na,1\nb\n", r"x.csv, line 3: has 1 fields, the header 2"),
        ("x.csv", b"text,label\na,1,2\n", r"x.csv, line 2: has 3 fields, the header 2"),
        ("x.csv", "text,label\nfa\xe7ade,1\n".encode("latin-1"), r"x.csv is not UTF-8 text: byte 0xe7"),
        ("x.jsonl.gz", b"no gzip", r"x.jsonl.gz cannot be read"),
        ("x.parquet", b"no parquet", r"x.parquet cannot be read"),
        ("x.npz", b"no archive", r"x.npz cannot be read"),
        ("x.json", b'[{"text": "a"},\n 3]', r"x.json, row 2: holds a int"),
        ("x.json", b'[{"text": "a"},\n ?]', r"x.json, line 2: not valid JSON"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, sentence: str):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(BadInput, match=sentence):
        read_source(DataSpec(source=name), tmp_path)


def test_an_archive_without_the_arrays_says_what_it_has(tmp_path: Path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), dtype=np.uint8))

    with pytest.raises(BadInput, match=r"x.npz has no arrays x_train and y_train; it has images"):
        read_source(DataSpec(source="x.npz"), tmp_path)


def test_a_folder_without_a_train_file_says_what_it_has(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", list(ROWS))
    write_lines(tmp_path / "b.jsonl", list(ROWS))

    with pytest.raises(BadInput, match=r"has no file named train .* it has a.jsonl, b.jsonl"):
        read_source(DataSpec(source=str(tmp_path)), Path())


def test_a_missing_file_says_where_relative_paths_start(tmp_path: Path):
    with pytest.raises(BadInput, match=r"there is no file or folder .*films.csv; relative paths start at "):
        read_source(DataSpec(source="films.csv"), tmp_path)


def test_a_misspelt_built_in_is_recognized(tmp_path: Path):
    with pytest.raises(BadInput, match="did you mean 'stdlib-docs'"):
        read_source(DataSpec(source="stdlib_docs"), tmp_path)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path):
    (tmp_path / "x.doc").write_text("hello")

    with pytest.raises(BadInput, match=r"x.doc: unknown format; known are csv, tsv, json, jsonl, ndjson, parquet"):
        read_table(tmp_path / "x.doc")


def test_labels_written_as_numbers_keep_their_order_in_every_format(tmp_path: Path):
    (tmp_path / "x.csv").write_text("text,label\na,10\nb,9\nc,2\n")
    table = read_table(tmp_path / "x.csv")

    names = find_labels([table], "label")

    assert names == ("2", "9", "10")
    assert LabelTable(names).codes(table, "label").tolist() == [2, 1, 0]


def test_a_number_is_a_code_only_where_names_are_no_numbers(tmp_path: Path):
    table = read_table(write_lines(tmp_path / "x.jsonl", [{"label": 1}]))

    assert LabelTable(["no", "yes"]).codes(table, "label").tolist() == [1]
    with pytest.raises(BadInput, match="label 1 is not in the label table"):
        LabelTable(["2", "3"]).codes(table, "label")
