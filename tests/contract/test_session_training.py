"""How a method may steer a training: masks, named batches, another `local`, streams apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, same, session, silent, task_of, workspace, write_reviews

from lorabbit.errors import Refused
from lorabbit.job.spec import JobSpec, LocalSpec
from lorabbit.types import Tensors
from lorabbit_client.execution.private_state import PrivateState


def spec_of(folder: Path, **parts: Any) -> JobSpec:
    write_reviews(folder)
    return job(folder, model={"lora": {"rank": 4, "alpha": 6}}, **parts)


def filled(tensors: Tensors) -> dict[str, Any]:
    """The same tensors with nothing at zero, so that decay would move everything."""
    generator = np.random.default_rng(7)
    return {n: (v.astype(np.float32) + generator.normal(0, 0.1, v.shape)).astype(v.dtype) for n, v in tensors.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_outside_a_mask_keep_their_bits(dtype: str, optimizer: str, tmp_path: Path):
    spec = job(
        tmp_path,
        model={"dtype": dtype},
        local={"optimizer": optimizer, "weight_decay": 0.1, "momentum": 0.9 if optimizer == "sgd" else 0.0},
    )
    write_reviews(tmp_path)
    one = session(workspace(spec), spec)
    one.load(filled(one.tensors()))
    start = one.tensors()
    mask = {n: np.arange(v.shape[0])[:, None] % 2 == 0 for n, v in start.items() if ".lora_" in n}

    end = one.train(mask=mask).tensors

    for name, rows in mask.items():
        still = ~np.broadcast_to(rows, start[name].shape)
        assert start[name][still].tobytes() == end[name][still].tobytes()
        assert not np.array_equal(start[name][~still], end[name][~still])


def test_a_mask_of_nothing_but_true_changes_no_bit(tmp_path: Path):
    spec = spec_of(tmp_path)
    everything = {n: np.ones((1,) * v.ndim, dtype=bool) for n, v in session(workspace(spec), spec).tensors().items()}

    results = [session(workspace(spec), spec).train(mask=mask).tensors for mask in (None, everything)]

    assert same(*results)


def test_no_gradient_is_computed_for_what_is_wholly_masked(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    low = {n: np.zeros((1, 1), dtype=bool) for n in one.tensors() if ".layer.0." in n}
    seen: list[bool] = []
    layer = space._model.model.get_submodule("base_model.model.bert.encoder.layer.0")
    layer.register_forward_hook(
        lambda _m, _i, out: seen.append((out if torch.is_tensor(out) else out[0]).requires_grad)
    )

    one._activation_cache = None  # every step goes through the lowest block
    one.train(mask=low)
    session(space, spec).train()

    assert seen[:10] == [False] * 10
    assert seen[10:] == [True] * 10


@pytest.mark.parametrize("change", ["names", "shapes", "dtypes"])
def test_a_mask_that_does_not_fit_is_refused(change: str, tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    name = next(iter(one.tensors()))
    wrong: dict[str, Any] = {
        "names": {"other": np.ones(1, dtype=bool)},
        "shapes": {name: np.ones((1, 3), dtype=bool)},
        "dtypes": {name: np.ones((1, 1), dtype=np.float32)},
    }

    with pytest.raises(Refused) as refusal:
        one.train(mask=wrong[change])

    assert refusal.value.reason == change


def test_named_batches_are_taken_in_order_in_every_epoch(tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    seen = watch(one)

    result = one.train(batches=[[3, 1], [5]], local=LocalSpec(epochs=2.0))

    assert result.steps == one.steps == 4
    assert seen == [[3, 1], [5], [3, 1], [5]]


def watch(one: Any) -> list[list[int]]:
    """Positions of the rows of each batch, as they are asked for."""
    seen: list[list[int]] = []
    features = one._data.train.features
    rows = list(one._data.train.rows)
    batch = features.batch

    class Watched(type(features)):  # type: ignore[misc]
        def batch(self, asked: Any) -> Any:
            seen.append([rows.index(row) for row in asked])
            return batch(asked)

    features.__class__ = Watched
    return seen


def test_all_windows_of_an_example_are_trained_on(tmp_path: Path):
    spec = job(
        tmp_path,
        model={"task": "question-answering"},
        data={**data_of(tmp_path, "question-answering"), "max_length": 16},
        local={"steps": None, "epochs": 1.0},
    )
    one = session(workspace(spec), spec)
    train = one._data.train
    assert len(train) > train.num_examples
    seen = watch(one)

    one.train(batches=[[1], [0]])

    owner = train.features.examples_of(train.rows)
    first = [position for position, example in enumerate(owner) if example == owner[0]]
    second = [position for position, example in enumerate(owner) if example == owner[len(first)]]
    assert seen == [second, first]


def test_another_local_replaces_the_jobs(tmp_path: Path):
    other = {"steps": 3, "batch_size": 4, "learning_rate": 0.02}
    spec, changed = spec_of(tmp_path), spec_of(tmp_path, local=other)

    asked = session(workspace(spec), spec).train(local=changed.local)
    written = session(workspace(changed), changed).train()

    assert asked.steps == 3
    assert same(asked.tensors, written.tensors)


def test_two_trainings_of_one_task_draw_apart_when_their_streams_differ(tmp_path: Path):
    spec = spec_of(tmp_path)
    ends = [session(workspace(spec), spec).train(stream=stream).tensors for stream in ("", "a", "b", "a")]

    assert same(ends[1], ends[3])
    assert not same(ends[0], ends[1])
    assert not same(ends[1], ends[2])


def test_a_session_knows_its_round_seed_and_private_tensors(tmp_path: Path):
    spec = spec_of(tmp_path)
    private = PrivateState()
    task = task_of(spec, round=2)
    one = workspace(spec).session(task, private, silent)

    one.private_tensors["own"] = {"w": np.ones(1, np.float32)}

    assert (one.round, one.seed, one.local, one.scaling) == (2, task.seed, spec.local, 1.5)
    assert list(private.tensors) == ["own"]
