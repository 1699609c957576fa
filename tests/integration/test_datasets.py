"""The public datasets that LORABBIT_DATA names: every one loads, splits and encodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorabbit.job.spec import JobSpec
from lorabbit_client.dataset import describe, load_client
from lorabbit_client.models import tiny
from lorabbit_client.tasks.image_classification import ImageFormat

pytestmark = [pytest.mark.data, pytest.mark.slow]

TEXT, PAIR, IMAGE = "text-classification", "text-pair-classification", "image-classification"
SETS: list[tuple[str, str, dict[str, Any], int, int, int]] = [
    ("sst2", TEXT, {"kind": "dirichlet"}, 6920, 1821, 2),
    ("subj", TEXT, {"kind": "iid"}, 7000, 2000, 2),
    ("mpqa", TEXT, {"kind": "quantity"}, 7606, 2000, 2),
    ("trec", TEXT, {"kind": "dirichlet", "alpha": 0.1}, 5452, 500, 6),
    ("cola", TEXT, {"kind": "natural", "field": "source"}, 8551, 1043, 2),
    ("mrpc", PAIR, {"kind": "dirichlet"}, 4076, 1725, 2),
    ("rte", PAIR, {"kind": "iid"}, 2490, 277, 2),
    ("20newsgroups", TEXT, {"kind": "pathological", "classes": 5}, 11314, 7532, 20),
    ("semeval2010_task8", TEXT, {"kind": "dirichlet"}, 8000, 2717, 19),
    ("wnut17", "token-classification", {"kind": "iid"}, 3394, 1287, 13),
    ("squad_v1.1", "question-answering", {"kind": "natural", "field": "title"}, 87599, 10570, 0),
    ("cifar10", IMAGE, {"kind": "pathological"}, 8000, 2000, 10),
    ("mnist", IMAGE, {"kind": "dirichlet"}, 60000, 10000, 10),
    ("shakespeare_tiny", "causal-lm", {"kind": "natural", "field": "client"}, 5661, 1436, 0),
]


@pytest.fixture(scope="module")
def root() -> Path:
    folder = os.environ.get("LORABBIT_DATA")
    if not folder:
        pytest.skip("LORABBIT_DATA names no folder of datasets")
    return Path(folder)


@pytest.mark.parametrize("case", SETS, ids=[s[0] for s in SETS])
def test_a_public_dataset_is_read_whole_and_split_over_ten_clients(root: Path, case: tuple[Any, ...]):
    name, task, partition, train, test, labels = case
    spec = JobSpec.model_validate({"model": {"task": task}, "data": {"source": name, "partition": partition}})

    outline = describe(spec, 10, root)

    assert (outline.train, outline.test, len(outline.labels)) == (train, test, labels)
    assert sum(share.train for share in outline.clients) == train
    assert sum(share.test for share in outline.clients) == test
    assert all(share.train > 0 for share in outline.clients)


@pytest.mark.parametrize(("name", "task"), [s[:2] for s in SETS], ids=[s[0] for s in SETS])
def test_a_public_dataset_is_encoded(root: Path, name: str, task: str):
    spec = JobSpec.model_validate({"model": {"task": task}, "data": {"source": name, "limit": 200}})
    language = task == "causal-lm"
    processor = ImageFormat(32, 32) if task == IMAGE else tiny.tiny_tokenizer("gpt2" if language else "bert")

    data = load_client(spec, 1, 4, processor=processor, data_root=root)
    batch = data.train.batch(np.arange(4))

    assert data.train.num_examples == 50
    assert all(len(value) == 4 for value in batch.values())


def test_the_full_cifar10_is_read_from_its_packed_jpegs(root: Path):
    spec = JobSpec.model_validate({"model": {"task": IMAGE}, "data": {"source": "cifar10/cifar10_full_jpeg.npz"}})

    outline = describe(spec, 10, root)

    assert (outline.train, outline.test) == (50000, 10000)
