"""How much blocks move when the embeddings do: F5 of the FibecFed specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, write_reviews

from lorabbit.errors import BadInput
from lorabbit_client.analysis.probe import batch_at, call, evaluation_mode, fp32_overrides, losses
from lorabbit_client.analysis.sensitivity import ProbeSettings, _loss_gradient, _noise, sensitivities
from lorabbit_client.data.features import Batch, Features, Scorer
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.training.workspace import LearningWorkspace


def client(folder: Path, **model: Any) -> tuple[Any, Examples]:
    torch.set_num_threads(1)
    write_reviews(folder)
    spec = job(folder, model={"dropout": 0.2, **model})
    space = LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"))
    return space._model, space._data(0, spec.clients).train


def probe(**knobs: Any) -> ProbeSettings:
    return ProbeSettings(**{"noise": 0.05, "draws": 2, "probes": 6, "variant": "relative", "seed": 11, **knobs})


class Padded(Features):
    """The same rows with more padding behind them."""

    def __init__(self, inner: Features, extra: int) -> None:
        self._inner, self._extra = inner, extra

    def __len__(self) -> int:
        return len(self._inner)

    @property
    def lengths(self) -> IntArray:
        return self._inner.lengths

    def batch(self, rows: IntArray) -> Batch:
        batch = self._inner.batch(rows)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, self._extra))
        return batch

    def scorer(self) -> Scorer:
        return self._inner.scorer()


def test_F5_no_noise_moves_nothing(tmp_path: Path) -> None:
    assert np.all(sensitivities(*client(tmp_path), probe(noise=0.0)) == 0.0)


def test_F5_there_is_one_positive_value_for_each_block(tmp_path: Path) -> None:
    found = sensitivities(*client(tmp_path), probe())

    assert found.shape == (2,)
    assert np.all(found > 0)


def test_F5_the_same_seed_gives_the_same_values_and_another_seed_others(tmp_path: Path) -> None:
    model, rows = client(tmp_path)

    first, again, other = (sensitivities(model, rows, probe(seed=seed)) for seed in (1, 1, 2))

    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_F5_padding_has_no_influence(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    wider = Examples(Padded(rows.features, 13), rows.rows, rows.num_examples)

    np.testing.assert_allclose(sensitivities(model, wider, probe()), sensitivities(model, rows, probe()), rtol=1e-5)


def test_F5_dropout_is_off_meanwhile_and_the_training_mode_comes_back(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    model.model.eval()
    quiet = sensitivities(model, rows, probe())
    model.model.train()

    training = sensitivities(model, rows, probe())

    assert np.array_equal(training, quiet)
    assert all(module.training for module in model.model.modules())


def test_F5_measuring_advances_no_generator_and_moves_no_parameter(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    state = torch.get_rng_state()
    values = {name: value.detach().clone() for name, value in model.model.named_parameters()}

    sensitivities(model, rows, probe())

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, values[name]) for name, value in model.model.named_parameters())


def test_small_noise_moves_blocks_in_proportion(tmp_path: Path) -> None:
    model, rows = client(tmp_path)

    small, double = (sensitivities(model, rows, probe(noise=noise)) for noise in (1e-3, 2e-3))

    np.testing.assert_allclose(double / small, 2.0, rtol=0.02)


def test_gain_is_the_change_of_a_block_over_the_change_before_it(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    one = {"probes": 1, "draws": 1}

    absolute, gain = (sensitivities(model, rows, probe(variant=variant, **one)) for variant in ("abs", "gain"))

    assert gain[1] == pytest.approx(absolute[1] / absolute[0], rel=1e-6)


# ---- noise along the gradient ----
def test_F5_adversarial_noise_needs_no_seed_and_no_draws_and_padding_has_no_influence(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    wider = Examples(Padded(rows.features, 13), rows.rows, rows.num_examples)
    every = {"probes": 100, "direction": "adversarial"}

    first = sensitivities(model, rows, probe(**every))

    np.testing.assert_allclose(sensitivities(model, rows, probe(**every, seed=3, draws=5)), first, rtol=1e-6)
    np.testing.assert_allclose(sensitivities(model, wider, probe(**every)), first, rtol=1e-5)
    assert np.all(sensitivities(model, rows, probe(**every, noise=0.0)) == 0.0)
    assert not np.allclose(sensitivities(model, rows, probe(probes=100)), first)


def test_adversarial_noise_raises_the_loss_of_every_example_more_than_random_noise_of_its_norm(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    names = np.arange(8)
    batch, overrides, told = batch_at(model, rows, names), fp32_overrides(model), {}
    with evaluation_mode(model):
        gradient = _loss_gradient(model, overrides, batch)
        for direction, given in (("none", None), ("random", None), ("adversarial", gradient)):
            small = probe(noise=0.0 if direction == "none" else 1e-3)
            with torch.no_grad(), _noise(model, batch, names, probe=small, draw=0, direction=given):
                told[direction] = losses(call(model, overrides, batch), batch)

    grown = {direction: told[direction] - told["none"] for direction in ("random", "adversarial")}
    assert bool((grown["adversarial"] > 0).all())
    assert bool((grown["adversarial"] > grown["random"]).all())


def test_F14_adversarial_noise_leaves_parameters_gradients_and_generators_as_they_were(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    state = torch.get_rng_state()
    before = {name: (value.detach().clone(), value.requires_grad) for name, value in model.model.named_parameters()}

    sensitivities(model, rows, probe(direction="adversarial"))

    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None


def test_a_model_without_blocks_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = {"name": "cnn:1", "task": "image-classification", "dropout": None}
    spec = job(tmp_path, model=model, data=data_of(tmp_path, "image-classification"))
    space = LearningWorkspace(spec, data_root=tmp_path, device=torch.device("cpu"))

    with pytest.raises(BadInput, match=r"^model\.name: "):
        sensitivities(space._model, space._data(0, 2).train, probe())
