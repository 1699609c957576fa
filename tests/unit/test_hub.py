"""Hub datasets without a hub: what its library loads becomes tables, and its absence one sentence."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.sources import read_hub, read_source


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def save(folder: Path, **splits: list[int]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, labels in splits.items():
        rows = {"text": [f"text {row}" for row in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")


def test_a_hub_dataset_brings_its_splits_and_the_names_of_its_classes(tmp_path: Path):
    save(tmp_path, train=[0, 1, 1], test=[1, 0])

    source = read_hub(str(tmp_path), None)

    assert source.train.columns == {"text": ["text 0", "text 1", "text 2"], "label": [0, 1, 1]}
    assert source.test is not None
    assert source.test.columns["label"] == [1, 0]
    assert source.declared_labels("label") == ("no", "yes")


def test_the_validation_split_serves_where_the_test_labels_are_withheld(tmp_path: Path):
    save(tmp_path, train=[0, 1, 1], validation=[1, 0], test=[-1, -1])

    source = read_hub(str(tmp_path), None)

    assert source.test is not None
    assert source.test.columns["label"] == [1, 0]


def test_a_hub_dataset_without_training_rows_says_what_it_has(tmp_path: Path):
    save(tmp_path, test=[1, 0])

    with pytest.raises(BadInput, match="has no train split; it has test"):
        read_hub(str(tmp_path), None)


def test_a_name_that_is_nowhere_says_where_it_was_looked_for():
    with pytest.raises(BadInput, match=r"'nobody/nothing' is neither built in nor a file or folder, .* switched off"):
        read_source(DataSpec(source="nobody/nothing"), Path())
