"""A client's data: shares of one shared copy, the same test set for every partition, no surprises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit_client.dataset import describe, load_client, load_labels, load_test
from lorabbit_client.models import tiny

BERT = tiny.tiny_tokenizer("bert")
ROWS = [{"text": f"text number {row}", "label": "abc"[row % 3], "author": f"author {row % 7}"} for row in range(120)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def job(task: str = "text-classification", seed: int = 0, **data: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"model": {"task": task}, "data": {"source": "x.jsonl", "test_share": 0.25, **data}, "seed": seed}
    )


def texts_of(examples: Any) -> set[tuple[int, ...]]:
    return {
        tuple(ids[ids != BERT.pad_token_id].tolist()) for ids in examples.batch(np.arange(len(examples)))["input_ids"]
    }


def test_clients_share_one_encoded_copy(root: Path):
    spec = job()

    first = load_client(spec, 0, 4, processor=BERT, data_root=root)
    second = load_client(spec, 1, 4, processor=tiny.tiny_tokenizer("bert"), data_root=root)

    assert first.train.features is second.train.features


def test_clients_together_hold_every_row_once(root: Path):
    spec = job(partition={"kind": "dirichlet"})

    clients = [load_client(spec, k, 5, processor=BERT, data_root=root) for k in range(5)]

    held = [text for client in clients for part in (client.train, client.test) if len(part) for text in texts_of(part)]
    assert len(held) == len(set(held)) == 120


def test_the_test_set_does_not_depend_on_the_partition(root: Path):
    sets = [
        texts_of(load_test(job(partition=partition), processor=BERT, data_root=root))
        for partition in ({"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.1}, {"kind": "pathological"})
    ]

    assert sets[0] == sets[1] == sets[2]
    assert len(sets[0]) == pytest.approx(30, abs=1)


def test_another_seed_holds_out_other_rows(root: Path):
    one = texts_of(load_test(job(seed=1), processor=BERT, data_root=root))
    other = texts_of(load_test(job(seed=2), processor=BERT, data_root=root))

    assert one != other


def test_the_outline_says_what_the_clients_then_hold(root: Path):
    spec = job(partition={"kind": "natural", "field": "author"})

    outline = describe(spec, 3, root)
    clients = [load_client(spec, k, 3, processor=BERT, data_root=root) for k in range(3)]

    assert outline.labels == ("a", "b", "c") == load_labels(spec, root)
    assert [(share.train, share.test) for share in outline.clients] == [(len(c.train), len(c.test)) for c in clients]
    assert [share.label_counts for share in outline.clients] == [c.label_counts for c in clients]
    assert sum(sum(share.label_counts.values()) for share in outline.clients) == outline.train
    assert outline.train + outline.test == 120


def test_the_limit_takes_that_many_rows(root: Path):
    outline = describe(job(limit=50), 2, root)

    assert outline.train + outline.test == 50


def test_an_unknown_group_field_is_named(root: Path):
    with pytest.raises(BadInput, match=r"data file x.jsonl has no field 'writer'; it has text, label, author"):
        describe(job(partition={"kind": "natural", "field": "writer"}), 2, root)


def test_a_skew_by_class_is_refused_where_there_are_no_classes(root: Path):
    with pytest.raises(BadInput, match="dirichlet splits by class"):
        describe(job("causal-lm", partition={"kind": "dirichlet"}), 2, root)


def test_one_row_cannot_be_split(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 0}\n')

    with pytest.raises(BadInput, match="has 1 rows; at least 2"):
        describe(job(), 1, tmp_path)


def test_the_standard_library_is_split_by_module_without_asking():
    spec = JobSpec.model_validate({"data": {"partition": {"kind": "natural"}}})

    outline = describe(spec, 6)

    sizes = [share.train for share in outline.clients]
    assert max(sizes) - min(sizes) < 0.1 * max(sizes)
    assert outline.test / (outline.train + outline.test) == pytest.approx(0.15, abs=0.01)


def test_a_role_that_the_task_does_not_have_is_named(root: Path):
    with pytest.raises(BadInput, match=r"data\.fields: text-classification has no role 'body'; it has text, label"):
        describe(job(fields={"body": "text"}), 2, root)
