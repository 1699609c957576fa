"""What every model and every kind of trainable parameters promises a method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import first, job, same, score, session, silent, workspace, write_normed, write_reviews

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit_client.training.evaluation import evaluate
from lorabbit_client.training.workspace import LearningWorkspace

TEXT_MODELS = ("tiny:bert", "tiny:roberta", "tiny:distilbert", "tiny:gpt2", "tiny:llama")
KINDS = ("lora", "full", "bitfit", "adapter", "head")


def score_on_training_rows(space: LearningWorkspace, spec: JobSpec) -> Any:
    return evaluate(space._model, space._data(0, spec.clients).train, 8, on_progress=silent)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_round_trips_its_tensors(kind: str, tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path, model={"trainable": kind})
    space = workspace(spec)
    tensors = session(space, spec).tensors()
    moved = {n: (v + 1).astype(v.dtype) for n, v in tensors.items()}

    loaded = session(space, spec)
    loaded.load(moved)

    assert same(loaded.tensors(), moved)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes_in_another_process_worth_of_state(kind: str, tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path, model={"trainable": kind, "lora": {"rank": 4, "dropout": 0.1}, "dropout": 0.1})

    results = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        results.append(session(workspace(spec), spec).train().tensors)

    assert same(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_another_job_seed_starts_elsewhere(kind: str, tmp_path: Path):
    write_reviews(tmp_path)
    specs = [job(tmp_path, model={"trainable": kind}, seed=seed) for seed in (0, 1)]

    first, second = (session(workspace(spec), spec).tensors() for spec in specs)

    assert not same(first, second)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "lora") for name in TEXT_MODELS),
        *(("tiny:bert", kind) for kind in KINDS if kind != "lora"),
        *((name, "adapter") for name in ("tiny:gpt2", "tiny:distilbert", "tiny:llama")),
        ("tiny:llama", "full"),
    ],
)
def test_every_tiny_model_learns(name: str, kind: str, tmp_path: Path):
    write_reviews(tmp_path)
    # A linear head on frozen random features has less to move and moves it slower.
    local = {"steps": 100, "learning_rate": 0.05} if kind == "head" else {"steps": 40, "learning_rate": 0.01}
    spec = job(tmp_path, model={"name": name, "trainable": kind}, local=local)
    space = workspace(spec)
    one = session(space, spec)
    before = score_on_training_rows(space, spec)

    one.train()

    after = score_on_training_rows(space, spec)
    assert after.loss < 0.5 * before.loss
    assert after.values["accuracy"] >= 0.9


def test_frozen_tensors_keep_their_bits_and_the_base_its_hash(tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    start = one.tensors()

    end = one.train(frozen=lambda name: ".lora_A." in name).tensors

    moved = {name for name in start if start[name].tobytes() != end[name].tobytes()}
    assert moved == {name for name in start if ".lora_A." not in name}
    assert space.base_sha256 == workspace(spec).base_sha256


def test_a_session_sees_nothing_of_the_client_before_it(tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path)
    space = workspace(spec)
    fresh = session(space, spec, index=1).tensors()
    session(space, spec, index=0).train()

    later = session(space, spec, index=1)

    assert same(later.tensors(), fresh)


def test_tensors_are_copies(tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path)
    one = session(workspace(spec), spec)
    before = one.tensors()
    kept = {name: value.copy() for name, value in before.items()}

    one.train()

    assert same(before, kept)


@pytest.mark.parametrize("change", ["names", "shapes", "dtypes"])
def test_a_payload_that_does_not_fit_is_refused_by_name(change: str, tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path)
    one = session(workspace(spec), spec)
    name, value = next(iter(one.tensors().items()))
    wrong = {"names": ("other", value), "shapes": (name, value[:-1]), "dtypes": (name, value.astype(np.float64))}

    with pytest.raises(Refused) as refusal:
        one.load(dict([wrong[change]]))

    assert refusal.value.reason == change


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_what_it_is_on_the_wire(kind: str, dtype: str, tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path, model={"trainable": kind, "dtype": dtype})
    one = session(workspace(spec), spec)
    before = one.tensors()

    trained = one.train()

    assert {value.dtype.name for value in trained.tensors.values()} == {dtype}
    assert all(np.isfinite(value.astype(np.float32)).all() for value in trained.tensors.values())
    assert math.isfinite(trained.loss)
    assert not same(before, trained.tensors)
    one.load(trained.tensors)
    assert same(one.tensors(), trained.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_term_is_what_is_added_to_the_gradient(kind: str, tmp_path: Path):
    """Plain descent of rate r: w2' = w2 - r mu (w1 - w0), since the first step's term is zero."""
    write_reviews(tmp_path)
    rate, mu = 0.1, 0.5
    plain = {"optimizer": "sgd", "learning_rate": rate, "max_grad_norm": None}
    one, two = (job(tmp_path, model={"trainable": kind}, local={**plain, "steps": steps}) for steps in (1, 2))
    starts: dict[str, Any] = {}

    def pull(name: str, value: Any, start: Any) -> Any:
        starts[name] = start.numpy().copy()
        return mu * (value - start)

    w0 = session(workspace(one), one).tensors()
    w1 = session(workspace(one), one).train().tensors
    w2 = session(workspace(two), two).train().tensors
    pulled = session(workspace(two), two).train(gradient_term=pull).tensors

    assert same(starts, {name: w0[name] for name in starts})
    assert starts.keys() == w0.keys()
    for name, value in pulled.items():
        np.testing.assert_allclose(value, w2[name] - rate * mu * (w1[name] - w0[name]), rtol=1e-4, atol=1e-6)
    assert not same(pulled, w2)


def test_the_base_hash_tells_one_base_model_from_another(tmp_path: Path):
    write_reviews(tmp_path)
    specs = [job(tmp_path), job(tmp_path, seed=1), job(tmp_path, model={"name": "tiny:roberta"})]

    hashes = [workspace(spec).base_sha256 for spec in specs]

    assert len(set(hashes)) == 3


def test_only_what_is_trained_travels(tmp_path: Path):
    write_reviews(tmp_path)
    specs = {kind: job(tmp_path, model={"trainable": kind}) for kind in KINDS}

    names = {kind: set(session(workspace(spec), spec).tensors()) for kind, spec in specs.items()}

    assert names["head"] == {"classifier.weight", "classifier.bias"}
    assert names["head"] < names["bitfit"] < names["full"]
    assert all(n.endswith(".bias") or n.startswith("classifier.") for n in names["bitfit"])
    assert all(".adapter." in n or n.startswith("classifier.") for n in names["adapter"])
    assert all(".lora_" in n or "classifier" in n for n in names["lora"])


def test_bottlenecks_start_at_the_base_model(tmp_path: Path):
    write_reviews(tmp_path)
    losses = []
    for kind in ("adapter", "head"):
        spec = job(tmp_path, model={"trainable": kind})
        space = workspace(spec)
        head = {n: np.zeros_like(v) for n, v in first(space, spec).tensors.items() if n.startswith("classifier")}
        losses.append(score(space, spec, {**head, "classifier.weight": head["classifier.weight"] + 0.1}).loss)

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "tiny:brt"}, "did you mean 'tiny:bert'"),
        ({"name": "tiny:vit"}, "set model.task to 'image-classification'"),
        ({"name": "no-such/model"}, "cannot find 'no-such/model'"),
        ({"lora": {"targets": ["qury"]}}, "model.lora.targets: qury is no layer"),
        ({"name": "tiny:llama", "trainable": "bitfit"}, "trains biases"),
    ],
)
def test_a_model_that_cannot_be_is_one_clear_sentence(
    model: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_reviews(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = job(tmp_path, model=model)

    with pytest.raises(BadInput) as failure:
        session(workspace(spec), spec)

    assert sentence in str(failure.value)


def test_a_text_longer_than_the_model_reads_is_bad_input(tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path, data={"max_length": 513})

    with pytest.raises(BadInput, match=r"data\.max_length: 513, but tiny:bert reads at most 512"):
        session(workspace(spec), spec)


@pytest.mark.parametrize("kind", ["full", "bitfit", "head"])
def test_statistics_move_where_they_travel_and_nowhere_else(kind: str, tmp_path: Path):
    spec = job(
        tmp_path,
        model={"name": str(write_normed(tmp_path)), "task": "image-classification", "trainable": kind},
        data={"source": "digits", "limit": 40},
        local={"steps": 3},
    )
    space = workspace(spec)
    one = session(space, spec)
    before = one.tensors()
    buffers = {name: value.clone() for name, value in space._model.model.named_buffers()}

    after = one.train().tensors

    moved = {name for name, value in space._model.model.named_buffers() if not torch.equal(value, buffers[name])}
    assert moved == (set(buffers) if kind == "full" else set())
    assert moved <= after.keys()
    counters = [name for name in after if name.endswith("num_batches_tracked")]
    assert bool(counters) == (kind == "full")
    assert all(after[name].dtype == np.int64 and after[name] == before[name] + 3 for name in counters)
    one.load(after)
    assert same(one.tensors(), after)
