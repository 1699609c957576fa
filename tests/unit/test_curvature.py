"""The share of curvature that must not be lost: F13 of the FibecFed specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import job, write_reviews

from lorabbit_client.analysis import curvature
from lorabbit_client.analysis.curvature import (
    SpectralDensity,
    gap_share,
    lanczos,
    lossless_share,
    share_above,
    stable_share,
)
from lorabbit_client.analysis.probe import evaluation_mode
from lorabbit_client.dataset import Examples
from lorabbit_client.training.workspace import LearningWorkspace

HALF_AND_HALF = np.concatenate([np.full(100, 1e-4), np.linspace(1.0, 2.0, 100)])


def client(folder: Path) -> tuple[Any, Examples]:
    torch.set_num_threads(1)
    write_reviews(folder)
    spec = job(folder, model={"lora": {"rank": 2}})
    space = LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"))
    return space._model, space._data(0, spec.clients).train


def test_F13_half_of_the_mass_near_zero_and_half_above_one_gives_one_half() -> None:
    spectrum = lanczos(lambda vector: HALF_AND_HALF * vector, 200)

    assert stable_share(share_above(spectrum)) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_F13_the_share_is_always_between_half_of_the_mass_above_zero_and_all_of_it(seed: int) -> None:
    draw = np.random.default_rng(seed)
    weights = draw.random(30)
    above = share_above(SpectralDensity(draw.normal(0.3, 10.0 ** -(seed % 4), 30), weights / weights.sum()))

    assert above(0.0) / 2 <= stable_share(above) <= above(0.0)


def test_lanczos_finds_the_spectrum_of_a_small_matrix_exactly() -> None:
    matrix = np.array([[2.0, 1.0, 0.0], [1.0, -3.0, 0.5], [0.0, 0.5, 1.0]])

    found = lanczos(lambda vector: matrix @ vector, 3)

    np.testing.assert_allclose(found.nodes, np.linalg.eigvalsh(matrix), rtol=1e-9)
    assert found.weights.sum() == pytest.approx(1.0)


def test_the_first_gap_wider_than_four_lipschitz_constants_is_the_cut() -> None:
    ascending = np.array([0.0, 0.1, 0.2, 1.5, 9.0])

    assert gap_share(ascending, 0.25) == pytest.approx(1 - 3 / 5)
    assert gap_share(ascending, 1.0) == pytest.approx(1 - 4 / 5)
    assert gap_share(ascending, 10.0) == 1.0


def test_the_product_is_that_of_the_hessian_by_finite_differences(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    with evaluation_mode(model, attention="eager"), torch.enable_grad():
        surface = curvature.LossSurface(model, rows, np.arange(6))
        direction = np.random.default_rng(0).standard_normal(surface.size)
        direction /= np.linalg.norm(direction)
        step = 1e-2
        there, back = (surface._differentiate(surface._shifted_point(sign * step * direction)) for sign in (1, -1))

        expected = ((there - back) / (2 * step)).detach().numpy()
        found = surface.product(direction)

    assert float(found @ expected) / (np.linalg.norm(found) * np.linalg.norm(expected)) > 0.999


@pytest.mark.parametrize("rule", ["slq", "eigengap"])
def test_F13_a_models_share_is_in_range_the_same_every_time_and_leaves_attention_as_it_was(
    rule: Any, tmp_path: Path
) -> None:
    model, rows = client(tmp_path)
    usual = model.model.config._attn_implementation
    values = {name: value.detach().clone() for name, value in model.model.named_parameters()}

    first, again = (lossless_share(model, rows, range(6), rule=rule, seed=4) for _ in range(2))

    assert 0.0 < first <= 1.0
    assert first == again
    assert model.model.config._attn_implementation == usual
    assert all(torch.equal(value, values[name]) for name, value in model.model.named_parameters())
    assert all(value.grad is None for value in model.model.parameters())


def test_F13_second_derivatives_are_taken_with_eager_attention_and_do_not_pass_through_the_fused_one(
    tmp_path: Path,
) -> None:
    model, rows = client(tmp_path)
    assert model.model.config._attn_implementation == "sdpa"

    with evaluation_mode(model, attention="eager"), torch.enable_grad():
        assert model.model.config._attn_implementation == "eager"
        surface = curvature.LossSurface(model, rows, np.arange(4))
        assert np.any(surface.product(np.ones(surface.size)))

    with evaluation_mode(model), torch.enable_grad():
        surface = curvature.LossSurface(model, rows, np.arange(4))
        with pytest.raises(RuntimeError, match="derivative"):
            surface.product(np.ones(surface.size))
