"""Per-example gradients over LoRA factors: F1, F2 and F14 of the FibecFed specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job
from torch.func import functional_call, grad, vmap

from lorabbit_client.analysis import fisher
from lorabbit_client.analysis.probe import losses, parameter_names
from lorabbit_client.dataset import Examples
from lorabbit_client.models.trainable import TrainableModel
from lorabbit_client.training.workspace import LearningWorkspace

MODELS = [
    ("tiny:bert", "text-classification"),
    ("tiny:roberta", "text-classification"),
    ("tiny:distilbert", "text-pair-classification"),
    ("tiny:gpt2", "text-classification"),
    ("tiny:llama", "causal-lm"),
    ("tiny:gpt2", "causal-lm"),
    ("tiny:bert", "question-answering"),
    ("tiny:bert", "token-classification"),
    ("tiny:vit", "image-classification"),
    ("tiny:albert", "text-classification"),
    ("tiny:deberta-v2", "text-classification"),
    ("tiny:deberta-v2", "question-answering"),
]


def client(folder: Path, name: str = "tiny:bert", task: str = "text-classification") -> tuple[TrainableModel, Examples]:
    """A model of which both factors have been moved off their start, and one client's rows."""
    torch.set_num_threads(1)
    spec = job(folder, model={"name": name, "task": task}, data={**data_of(folder, task, 32), "max_length": 32})
    space = LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"))
    return space._model, space._data(0, spec.clients).train


def moved(model: TrainableModel) -> TrainableModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.tensors.items():
            if ".lora_B." in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def everything(model: TrainableModel) -> dict[str, Any]:
    """All that a measurement must leave as it found it."""
    parameters = dict(model.model.named_parameters())
    return {
        "values": {name: value.detach().clone() for name, value in parameters.items()},
        "buffers": {name: value.clone() for name, value in model.model.named_buffers()},
        "gradients": {name: None if value.grad is None else value.grad.clone() for name, value in parameters.items()},
        "flags": {name: value.requires_grad for name, value in parameters.items()},
        "modes": {name: module.training for name, module in model.model.named_modules()},
        "attention": getattr(getattr(model.model, "config", None), "_attn_implementation", None),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],  # noqa: NPY002 - the global generator that nobody may advance
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    return bool(np.all(left == right))


@pytest.mark.parametrize(("name", "task"), MODELS)
def test_F1_one_pass_for_a_batch_equals_the_models_own_loss_of_each_example_alone(
    name: str, task: str, tmp_path: Path
) -> None:
    model, rows = client(tmp_path, name, task)
    moved(model)

    fast = fisher.traces(model, rows, range(7), chunk=5)
    slow = fisher.traces(model, rows, range(7), loop=True)

    assert np.all(fast > 0)
    np.testing.assert_allclose(fast, slow, rtol=1e-4)


def test_F1_one_pass_for_a_batch_equals_vmap_of_grad(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    moved(model).model.eval()
    batch = rows.batch(np.arange(5))
    # vmap cannot follow the library's look at a mask of two axes, so it gets the finished one of four.
    open_ = batch["attention_mask"].float()[:, None, None, :].expand(-1, -1, batch["input_ids"].shape[1], -1)
    own = parameter_names(model)
    state = dict(model.model.named_parameters())

    def loss(values: dict[str, torch.Tensor], row: dict[str, torch.Tensor]) -> torch.Tensor:
        alone = {name: value.unsqueeze(0) for name, value in row.items()}
        return losses(functional_call(model.model, values, kwargs=alone), alone).sum()

    factors = {name: state[name].detach() for name in own.values()}
    with pytest.warns(UserWarning, match="batching rule"):
        expected = vmap(grad(loss), in_dims=(None, 0))(factors, {**batch, "attention_mask": (open_ - 1) * 1e9})

    ((places, found),) = fisher.per_example_gradients(model, rows, range(5))

    for name, value in found.items():
        torch.testing.assert_close(value, expected[own[name]][torch.from_numpy(places)], rtol=1e-3, atol=1e-6)


def test_F1_a_permuted_dataset_has_permuted_difficulties(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    order = np.random.default_rng(1).permutation(len(rows))

    straight = fisher.traces(model, rows, range(len(rows)))
    permuted = fisher.traces(model, rows, order.tolist())

    np.testing.assert_allclose(permuted, straight[order], rtol=1e-4)


def test_F1_the_mean_difficulty_is_the_trace_of_the_mean_diagonal_fisher(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    moved(model)

    diagonal = fisher.mean_squares(model, rows, range(9))
    trace = sum(float(np.sum(value, dtype=np.float64)) for value in diagonal.values())

    assert trace == pytest.approx(float(fisher.traces(model, rows, range(9)).mean()), rel=1e-5)


def test_the_squared_gradient_of_a_batch_is_not_the_fisher_trace(tmp_path: Path) -> None:
    model, rows = client(tmp_path)
    ((_, gradients),) = fisher.per_example_gradients(moved(model), rows, range(8))

    of_the_mean = sum(float(value.mean(0).square().sum()) for value in gradients.values())

    assert of_the_mean < 0.9 * float(fisher.traces(model, rows, range(8)).mean())


def test_F2_at_the_start_every_a_factor_has_a_fisher_of_zero_and_some_b_factor_has_not(tmp_path: Path) -> None:
    model, rows = client(tmp_path)

    diagonal = fisher.mean_squares(model, rows, range(6))

    assert all(not np.any(value) for name, value in diagonal.items() if ".lora_A." in name)
    assert any(np.any(value > 0) for name, value in diagonal.items() if ".lora_B." in name)


def test_a_half_precision_base_is_measured_in_float32(tmp_path: Path) -> None:
    spec = job(tmp_path, model={"dtype": "bfloat16"}, data=data_of(tmp_path, "text-classification"))
    space = LearningWorkspace(spec, data_root=tmp_path, device=torch.device("cpu"))
    rows = space._data(0, 2).train

    ((_, gradients),) = fisher.per_example_gradients(space._model, rows, range(4))
    fast, slow = (fisher.traces(space._model, rows, range(4), loop=loop) for loop in (False, True))

    assert {value.dtype for value in gradients.values()} == {torch.float32}
    np.testing.assert_allclose(fast, slow, rtol=1e-4)


@pytest.mark.parametrize("loop", [False, True])
def test_F14_a_pass_leaves_parameters_gradients_generators_and_flags_as_found(loop: bool, tmp_path: Path) -> None:  # noqa: FBT001
    model, rows = client(tmp_path)
    first = next(iter(model.parameters().values()))
    first.requires_grad = False
    list(model.parameters().values())[1].grad = torch.ones_like(list(model.parameters().values())[1])
    model.model.train()
    before = everything(model)

    fisher.mean_squares(model, rows, range(6), loop=loop)

    assert same(everything(model), before)


@pytest.mark.parametrize("whole", [False, True])
def test_shares_are_the_squared_gradients_of_all_that_is_trained_over_the_largest(
    whole: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    model, rows = client(tmp_path)
    moved(model)
    factors = fisher.mean_squares(model, rows, range(5))
    before = everything(model)

    found = fisher.shares(model.whole() if whole else model, rows, range(5))

    assert same(everything(model), before)
    assert found.keys() == (model.whole() if whole else model).parameters().keys()
    assert max(float(value.max()) for value in found.values()) == 1.0
    assert min(float(value.min()) for value in found.values()) >= 0.0
    if not whole:
        one = max(factors, key=lambda name: float(np.max(factors[name])))
        ratio = float(found[one].max()) / float(np.max(factors[one]))
        for name, value in factors.items():
            np.testing.assert_allclose(found[name].numpy(), ratio * value, rtol=1e-4, atol=1e-7)
