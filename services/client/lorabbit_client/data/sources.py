"""Where rows come from: built-in datasets, files and folders under the client's data root, the hub.

A name is looked for in that order. A folder holds `train`, `test` (else `dev`, `validation`, `val`)
files by name, and may state its label table in a `dataset.json`. Whatever is wrong is BadInput in
one sentence: nothing there, no train file, no network.

Datasets of the Hugging Face hub, from its cache where the hub does not answer.

The library itself retries an absent network for half a minute; so the hub is asked one question
first, with seconds to answer, and without an answer only the cache is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.file_readers import format_of, read_images, read_table
from lorabbit_client.data.stdlib_docs import AREAS, load_docs
from lorabbit_client.data.table import Source, Table
from lorabbit_client.models.source import HUB_ANSWER_SECONDS, call_with_timeout

TEST_SPLITS = ("test", "dev", "validation", "valid", "val")
"""Names of a test split, best first: a development split serves where there is no other."""


def read_hub(name: str, config: str | None) -> Source:
    """Return a hub dataset by its name and configuration; raises BadInput when neither hub nor cache has it."""
    import datasets  # noqa: PLC0415 - heavy, and only hub datasets need it

    datasets.disable_progress_bars()
    reachable, why = _check_hub(name)
    try:
        with _offline(not reachable):
            splits = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises dozens of unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"data.source: {name!r} is neither built in nor a file or folder, and not to be had from the hub:"
            f" {reason if reachable else why}"
        ) from error
    if "train" not in splits:
        raise BadInput(f"data.source: hub dataset {name!r} has no train split; it has {', '.join(splits)}")
    train = _table(splits["train"], f"hub dataset {name}, train")
    tests = (_table(splits[split], f"hub dataset {name}, {split}") for split in TEST_SPLITS if split in splits)
    test = next((table for table in tests if not _has_no_labels(table)), None)
    return Source(train, test, names_by_field=_class_names(splits["train"].features))


def _check_hub(name: str) -> tuple[bool, str]:
    """Tell whether the hub has a dataset, and if not, why."""
    from huggingface_hub import HfApi, constants  # noqa: PLC0415 - as above
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return False, "it is switched off by HF_HUB_OFFLINE, and its cache here has no such dataset"
    answer = call_with_timeout(HUB_ANSWER_SECONDS, lambda: HfApi().dataset_info(name, timeout=HUB_ANSWER_SECONDS))
    if isinstance(answer, RepositoryNotFoundError | HFValidationError):
        return False, "it has no such dataset (or a private one: log in first)"
    return answer is None, "it cannot be reached, and its cache here has no such dataset"


@contextmanager
def _offline(only_cache: bool) -> Iterator[None]:  # noqa: FBT001 - the one thing to say
    """Set the hub library to offline mode; it reads its environment variable only at import."""
    from huggingface_hub import constants  # noqa: PLC0415 - as above

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or only_cache
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _table(split: Any, name: str) -> Table:  # noqa: ANN401 - datasets.Dataset
    return Table(name, {column: list(split[column]) for column in split.column_names})


def _has_no_labels(table: Table) -> bool:
    """Tell whether a split has no labels (-1 everywhere), as GLUE's test splits."""
    labels = table.columns.get("label")
    return labels is not None and len(labels) > 0 and all(label == -1 for label in labels)


def _class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the label tables that a hub dataset states, by column."""
    found: dict[str, tuple[str, ...]] = {}
    for column, feature in features.items():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            found[column] = tuple(names)
    return found


STDLIB_DOCS = "stdlib-docs"
DIGITS = "digits"
BUILT_IN = (STDLIB_DOCS, DIGITS)
Stamp: TypeAlias = tuple[tuple[str, int, int], ...]


def read_source(spec: DataSpec, data_root: Path) -> Source:
    """Return the rows that a job's `data.source` names; relative paths start at `data_root`.

    Raises BadInput when there is no such source or it cannot be read.
    """
    if spec.source == STDLIB_DOCS:
        return _stdlib_docs()
    if spec.source == DIGITS:
        return _digits()
    path = data_root / Path(spec.source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if format_of(path) is not None or spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise BadInput(f"data.source: there is no file or folder {path}; relative paths start at {data_root.resolve()}")
    near = get_close_matches(spec.source, BUILT_IN, n=1, cutoff=0.75)
    if near:
        raise BadInput(f"data.source: {spec.source!r} is unknown; did you mean {near[0]!r}?")
    return read_hub(spec.source, spec.config)


def stamp(spec: DataSpec, data_root: Path) -> Stamp:
    """Return name, size and time of change of every file that a source may be read from; none where it is no file."""
    path = data_root / Path(spec.source).expanduser()
    if spec.source in BUILT_IN or not path.exists():
        return ()
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    found = ((file, file.stat()) for file in files)
    return tuple((file.name, about.st_size, about.st_mtime_ns) for file, about in found)


def _stdlib_docs() -> Source:
    docs = load_docs()
    columns = {
        "text": [doc.text for doc in docs],
        "label": [doc.label for doc in docs],
        "module": [doc.module for doc in docs],
        "name": [doc.name for doc in docs],
    }
    return Source(Table("data set stdlib-docs", columns), label_names=AREAS, group="module")


def _digits() -> Source:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 gray pixels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - heavy

    digits = load_digits()
    images = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
    names = tuple(str(name) for name in digits.target_names)
    return Source(Table("data set digits", {"image": images, "label": digits.target}), label_names=names)


def _file(path: Path) -> Source:
    if format_of(path) == "npz":
        return Source(*read_images(path))
    return Source(read_table(path))


def _folder(path: Path) -> Source:
    """Read the train and test files of a folder, and its label table where `dataset.json` states one."""
    names = _declared_labels(path / "dataset.json")
    files = sorted(
        file for file in path.iterdir() if file.is_file() and format_of(file) and file.name != "dataset.json"
    )
    archives = [file for file in files if format_of(file) == "npz"]
    tables = [file for file in files if format_of(file) != "npz"]
    if archives:
        train, test = read_images(_main_archive(path, archives))
        return Source(train, test, label_names=names)
    training = _of_split(tables, "train")
    if not training and len(tables) == 1:
        return Source(read_table(tables[0]), label_names=names)
    if not training:
        held = ", ".join(file.name for file in tables) or "no data files"
        raise BadInput(
            f"data.source: folder {path} has no file named train (train.jsonl, train.csv, ...); it has {held}"
        )
    testing = next((found for split in TEST_SPLITS if (found := _of_split(tables, split))), [])
    return Source(_concatenated(training), _concatenated(testing) if testing else None, label_names=names)


def _of_split(files: Sequence[Path], split: str) -> list[Path]:
    """Return the files of a split: `train.jsonl`, or parts such as `train-00000-of-00002.parquet`."""
    return [file for file in files if file.name.lower().split(".")[0].split("-")[0].split("_")[0] == split]


def _concatenated(files: Sequence[Path]) -> Table:
    """Read the parts of a split as one table; rows are then numbered through all parts."""
    tables = [read_table(file) for file in files]
    if len(tables) == 1:
        return tables[0]
    fields = list(dict.fromkeys(field for table in tables for field in table.columns))
    columns = {
        field: [value for table in tables for value in table.columns.get(field, [None] * len(table))]
        for field in fields
    }
    return Table(f"data files {files[0].name} to {files[-1].name}", columns)


def _main_archive(path: Path, archives: Sequence[Path]) -> Path:
    """Choose the archive named like its folder where there are several."""
    if len(archives) == 1:
        return archives[0]
    for archive in archives:
        if archive.stem == path.name:
            return archive
    names = ", ".join(archive.name for archive in archives)
    raise BadInput(f"data.source: folder {path} has several archives ({names}); name one of them")


def _declared_labels(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"data file {path} is not valid JSON: {error}") from error
    names = facts.get("label_names") if isinstance(facts, dict) else None
    return tuple(str(name) for name in names) if names else None
