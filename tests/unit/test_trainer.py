"""The training loop on a model whose every step can be computed on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from learning import silent
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lorabbit.errors import LoRAbbitError
from lorabbit.job.spec import LocalSpec
from lorabbit_client.data.features import Batch, Features, Scorer
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.execution.interface import Cancelled
from lorabbit_client.models.trainable import TrainableModel
from lorabbit_client.training.batching import epoch_order, steps_of
from lorabbit_client.training.trainer import Trainer, TrainingSchedule, lr_multiplier

CURVATURE, TARGET, START, RATE = 2.0, 3.0, -1.0, 0.05


class Quadratic(nn.Module):
    """Loss 1/2 a (w - b)^2 in each of two tensors, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([START]))
        self.v = nn.Parameter(torch.tensor([START]))

    def forward(self, batch: torch.Tensor) -> SequenceClassifierOutput:
        loss = 0.5 * CURVATURE * (((self.w - TARGET) ** 2).sum() + ((self.v - TARGET) ** 2).sum())
        return SequenceClassifierOutput(loss=loss * batch.mean())


class Ones(Features):
    """Rows that weigh nothing."""

    def __init__(self, count: int, value: float = 1.0) -> None:
        self._count, self._value = count, value

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> IntArray:
        return np.ones(self._count, dtype=np.int64)

    def batch(self, rows: IntArray) -> Batch:
        return {"batch": torch.full((len(rows),), self._value)}

    def scorer(self) -> Scorer:
        raise NotImplementedError


def toy(model: nn.Module | None = None) -> TrainableModel:
    model = model or Quadratic()
    tensors: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    initial = {name: value.detach().clone() for name, value in tensors.items()}
    return TrainableModel(model, tensors, torch.float32, 2, "", None, {}, initial)


def rows(count: int, value: float = 1.0) -> Examples:
    return Examples(Ones(count, value), np.arange(count), count)


def local(**knobs: Any) -> LocalSpec:
    return LocalSpec.model_validate(
        {"optimizer": "sgd", "learning_rate": RATE, "max_grad_norm": None, "steps": 7, "batch_size": 4, **knobs}
    )


def train(model: TrainableModel, knobs: LocalSpec | None = None, **extra: Any) -> Any:
    return Trainer(model, rows(10), knobs or local(), schedule=TrainingSchedule(1, 1), seed=5).run(silent, **extra)


def descent(steps: int, curvature: float, fixed_point: float) -> float:
    """w_n = w* + (1 - rate a)^n (w_0 - w*)."""
    return fixed_point + (1 - RATE * curvature) ** steps * (START - fixed_point)


def test_plain_descent_follows_its_closed_form():
    model = toy()

    trained = train(model)

    assert model.tensors["w"].item() == pytest.approx(descent(7, CURVATURE, TARGET), rel=1e-5)
    assert trained.steps == 7


def test_a_proximal_gradient_term_moves_the_fixed_point_as_its_algebra_says():
    model, mu = toy(), 1.5

    train(model, gradient_term=lambda _name, value, start: mu * (value - start))

    fixed_point = (CURVATURE * TARGET + mu * START) / (CURVATURE + mu)
    assert model.tensors["w"].item() == pytest.approx(descent(7, CURVATURE + mu, fixed_point), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_too_small_for_half_precision_add_up(dtype: torch.dtype, optimizer: str):
    """Every step is a 50th of what the dtype can tell apart at 1; together they are two such steps."""
    model = toy(Quadratic().to(dtype))
    step = torch.finfo(dtype).eps / 50
    sgd = optimizer == "sgd"
    rate = step / (CURVATURE * (TARGET - START)) if sgd else step  # Adam's steps are the rate, whatever the gradient

    train(model, local(optimizer=optimizer, learning_rate=rate, steps=100))

    assert model.tensors["w"].item() == pytest.approx(START + 100 * step, abs=torch.finfo(dtype).eps / 2)


def test_a_frozen_tensor_keeps_its_bits_while_the_others_move():
    model = toy()

    train(model, frozen=lambda name: name == "v")

    assert model.tensors["v"].item() == START
    assert model.tensors["w"].item() != START
    assert model.tensors["v"].requires_grad


def test_freezing_everything_is_refused():
    with pytest.raises(LoRAbbitError, match="nothing is left to train"):
        train(toy(), frozen=lambda _name: True)


def test_a_loss_that_is_not_finite_ends_the_task_with_advice():
    trainer = Trainer(toy(), rows(8, float("inf")), local(), schedule=TrainingSchedule(3, 5), seed=0)

    with pytest.raises(LoRAbbitError, match=r"round 3: lower local\.learning_rate"):
        trainer.run(silent)


def test_a_cancelled_training_leaves_a_model_that_trains_again():
    def cancel(_fraction: float, _loss: float | None) -> None:
        raise Cancelled

    model = toy()
    with pytest.raises(Cancelled):
        Trainer(model, rows(8), local(), schedule=TrainingSchedule(1, 1), seed=0).run(cancel)

    assert all(value.grad is None for value in model.tensors.values())
    model.reset()
    train(model)
    assert model.tensors["w"].item() == pytest.approx(descent(7, CURVATURE, TARGET), rel=1e-5)


def test_a_frozen_batch_norm_does_not_gather_statistics():
    class Normed(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, batch: torch.Tensor) -> SequenceClassifierOutput:
            self.norm(batch[:, None] * torch.arange(len(batch))[:, None])
            return super().forward(batch)

    model = toy(Normed())

    train(model)

    assert model.model.norm.running_mean.item() == 0.0


def test_progress_ends_at_one_with_the_mean_loss():
    seen: list[tuple[float, float | None]] = []

    trained = Trainer(toy(), rows(8), local(), schedule=TrainingSchedule(1, 1), seed=0).run(
        lambda f, loss: seen.append((f, loss))
    )

    assert seen[-1] == (1.0, trained.loss)


@pytest.mark.parametrize("size", [1, 16, 1000])
def test_an_epoch_holds_every_row_once_in_batches_of_like_length(size: int):
    lengths = np.random.default_rng(0).integers(1, 60, size)

    order = epoch_order(lengths, 8, seed=3)

    assert sorted(np.concatenate(order).tolist()) == list(range(size))
    assert all(len(batch) <= 8 for batch in order)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in order)
    assert padded <= 1.3 * lengths.sum() or size <= 16


def test_batches_hang_on_their_seed_alone():
    lengths = np.arange(100) % 9

    first, again, other = (epoch_order(lengths, 8, seed=seed) for seed in (1, 1, 2))

    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in other]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"epochs": 1}, 7),
        ({"epochs": 0.5}, 4),
        ({"epochs": 2.0}, 14),
        ({"steps": 3}, 3),
        ({}, 7),
        ({"epochs": 0.01}, 1),
    ],
)
def test_a_round_takes_the_steps_that_the_job_asks_for(knobs: dict[str, float], expected: int):
    assert steps_of(LocalSpec.model_validate({"batch_size": 8, **knobs}), 50) == expected


@pytest.mark.parametrize(
    ("schedule", "share", "expected"),
    [
        ("constant", 0.05, 0.5),
        ("constant", 0.9, 1.0),
        ("linear", 0.1, 1.0),
        ("linear", 0.55, 0.5),
        ("cosine", 0.1, 1.0),
        ("cosine", 0.55, 0.5),
        ("cosine", 1.0, 0.0),
    ],
)
def test_the_learning_rate_follows_its_schedule_over_the_whole_job(schedule: str, share: float, expected: float):
    knobs = LocalSpec.model_validate({"schedule": schedule, "warmup_share": 0.1})

    assert lr_multiplier(knobs, share) == pytest.approx(expected)


def test_the_schedule_never_stands_at_zero():
    assert (
        0.0
        < TrainingSchedule(1, 4).share(0, 10)
        < TrainingSchedule(1, 4).share(9, 10)
        < TrainingSchedule(2, 4).share(0, 10)
    )
    assert TrainingSchedule(4, 4).share(9, 10) < 1.0
