"""The kept prefix of a frozen encoder: the same bytes cold and warm, and what training without it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, silent, task_of, write_reviews

from lorabbit.job.spec import JobSpec
from lorabbit.tensors import lora_math
from lorabbit.types import Tensors
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.training.activation_cache import ActivationCache, canonical_groups
from lorabbit_client.training.workspace import LearningWorkspace

TARGETS = {
    "tiny:bert": ["query", "dense"],
    "tiny:roberta": ["query"],
    "tiny:distilbert": ["q_lin"],
    "tiny:vit": ["q_proj"],
}


def spec_of(folder: Path, name: str = "tiny:bert", layers: list[int] | None = None, **parts: Any) -> JobSpec:
    write_reviews(folder)
    factors = {"rank": 4, "targets": TARGETS[name], "layers": [1] if layers is None else layers}
    model = {"name": name, "lora": factors, **parts.pop("model", {})}
    if name == "tiny:vit":
        model["task"] = "image-classification"
        parts["data"] = data_of(folder, "image-classification")
    return job(folder, model=model, **parts)


def workspace(spec: JobSpec) -> LearningWorkspace:
    torch.set_num_threads(1)
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu"))


def session(
    space: LearningWorkspace, spec: JobSpec, cache: ActivationCache | None, index: int = 0, **extra: Any
) -> Any:
    one = space.session(task_of(spec, index, **extra), PrivateState(), silent)
    one._activation_cache = cache
    return one


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def skipped(result: Any) -> int:
    return int(result.facts["prefixes_kept"])


@pytest.mark.parametrize("name", TARGETS)
def test_training_with_a_kept_prefix_gives_what_training_without_it_gives(name: str, tmp_path: Path):
    spec = spec_of(tmp_path, name)
    space = workspace(spec)

    with_it = session(space, spec, ActivationCache()).train()
    without = session(space, spec, None).train()

    assert skipped(with_it) > 0
    assert skipped(without) == 0
    assert with_it.loss == pytest.approx(without.loss, rel=1e-4)
    for value, expected in zip(with_it.tensors.values(), without.tensors.values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("name", ["tiny:bert", "tiny:vit"])
def test_what_was_kept_before_changes_no_bit(name: str, tmp_path: Path):
    spec = spec_of(tmp_path, name)
    space, cache = workspace(spec), ActivationCache()
    for index in (1, 0):
        session(space, spec, cache, index, seed=9).train()

    warm = session(space, spec, cache).train()
    cold = session(workspace(spec), spec, ActivationCache()).train()
    crowded = session(workspace(spec), spec, ActivationCache(10**6)).train()

    assert skipped(warm) > skipped(cold)
    assert same(warm.tensors, cold.tensors)
    assert same(crowded.tensors, cold.tensors)


def test_the_clients_of_a_process_share_what_it_keeps_and_train_as_they_would_alone(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)

    def trained(space: LearningWorkspace, index: int) -> Any:
        return space.session(task_of(spec, index), PrivateState(), silent).train()

    together = [trained(space, index) for index in (1, 0, 1, 0)]
    alone = trained(workspace(spec), 0)

    assert skipped(together[3]) > skipped(together[1]) > 0
    assert same(together[1].tensors, alone.tensors)
    assert same(together[3].tensors, alone.tensors)


def test_eviction_changes_no_bit_and_keeps_to_the_budget(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    expected = session(space, spec, ActivationCache()).train().tensors
    cache = ActivationCache()
    one = session(space, spec, cache)
    cache.put("old", torch.zeros(2**18))
    find = one._find_prefix

    def crowded(*given: Any) -> Any:
        prefix = find(*given)
        cache.budget_bytes = 2**14
        return prefix

    one._find_prefix = crowded
    found = one.train()

    assert same(found.tensors, expected)
    assert cache._bytes <= 2**14 or len(cache._entries) == 1
    assert cache._bytes == sum(value.nbytes for value in cache._entries.values())


def test_a_shifted_base_has_a_prefix_of_its_own(tmp_path: Path):
    spec = spec_of(tmp_path, layers=[0, 1])
    space, cache = workspace(spec), ActivationCache()
    low = lambda name: ".layer.0." in name  # noqa: E731
    session(space, spec, cache).train(frozen=low)
    one = session(space, spec, cache)
    drawn = np.random.default_rng(2)
    shift = {
        n: drawn.normal(0, 0.2, v.shape).astype(v.dtype) for n, v in one.tensors().items() if lora_math.is_factor(n)
    }
    one.set_base_delta(shift)

    warm = one.train(frozen=low)

    other = session(workspace(spec), spec, ActivationCache())
    other.set_base_delta(shift)
    assert skipped(warm) > 0
    assert same(warm.tensors, other.train(frozen=low).tensors)


def test_other_frozen_factors_have_a_prefix_of_their_own(tmp_path: Path):
    """As when a method freezes lower blocks that were trained before. Adam would blow rounding up to its step."""
    spec = spec_of(tmp_path, layers=[0, 1], local={"optimizer": "sgd", "learning_rate": 0.01})
    space, cache = workspace(spec), ActivationCache()
    low = lambda name: ".layer.0." in name  # noqa: E731
    session(space, spec, cache).train(frozen=low)
    moved = {n: v + np.float32(0.1) for n, v in session(space, spec, None).tensors().items()}

    results = []
    for kept in (cache, ActivationCache(), None):
        one = session(space, spec, kept)
        one.load(moved)
        results.append(one.train(frozen=low))

    assert same(results[0].tensors, results[1].tensors)
    assert results[0].loss == pytest.approx(results[2].loss, rel=1e-4)


def test_a_head_alone_leaves_the_whole_encoder_out(tmp_path: Path):
    spec = spec_of(tmp_path, model={"trainable": "head"})
    space = workspace(spec)
    ran: list[int] = []
    space._model.model.get_submodule("bert.encoder.layer.1.attention").register_forward_hook(lambda *_: ran.append(1))

    cache = ActivationCache()
    session(space, spec, cache).train()
    filled = len(ran)
    result = session(space, spec, cache).train()

    assert len(ran) == filled + 1  # one row, to see whether a gradient would reach the encoder
    assert result.loss == pytest.approx(session(space, spec, None).train().loss, rel=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"dropout": 0.1}},
        {"layers": [0, 1]},
        {"name": "tiny:gpt2", "model": {"lora": {"rank": 4, "layers": [1]}}},
        {"local": {"steps": 1}},
        {"model": {"trainable": "full"}},
        {"model": {"trainable": "bitfit"}},
    ],
)
def test_no_prefix_is_kept_where_there_is_none_or_it_does_not_pay(parts: dict[str, Any], tmp_path: Path):
    if parts.get("name") == "tiny:gpt2":
        write_reviews(tmp_path)
        spec = job(tmp_path, model={"name": "tiny:gpt2", **parts["model"]})
    else:
        spec = spec_of(tmp_path, **parts)
    space = workspace(spec)

    results = [session(space, spec, cache).train() for cache in (ActivationCache(), None)]

    assert skipped(results[0]) == 0
    assert same(results[0].tensors, results[1].tensors)


def test_the_model_is_whole_again_afterwards(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec, None)
    batch = one._data.train.batch(np.arange(4))
    with torch.no_grad():
        before = space._model.model.eval()(**batch).logits

    session(space, spec, ActivationCache()).train()

    session(space, spec, None)
    with torch.no_grad():
        assert torch.equal(space._model.model.eval()(**batch).logits, before)


def test_dropout_above_the_prefix_draws_the_same_cold_and_warm(tmp_path: Path):
    spec = spec_of(tmp_path, model={"lora": {"rank": 4, "targets": ["query"], "layers": [1], "dropout": 0.2}})
    space, cache = workspace(spec), ActivationCache()

    cold, warm = (session(space, spec, cache).train() for _ in range(2))

    assert skipped(warm) > skipped(cold)
    assert same(cold.tensors, warm.tensors)


def test_groups_follow_from_the_lengths_alone():
    lengths = np.array([3, 5, 3, 3, 5] * 20)

    groups = canonical_groups(lengths)

    assert sorted(np.concatenate(groups).tolist()) == list(range(100))
    assert all(len(set(lengths[group])) == 1 and len(group) <= 32 for group in groups)
    assert [len(group) for group in groups] == [32, 28, 32, 8]
