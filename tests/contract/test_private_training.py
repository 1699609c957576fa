"""Training with private examples: the gradients, the clipping, the sampling, the ledger, and what stays at home."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, silent, task_of, write_normed, write_reviews

from lorabbit.errors import LoRAbbitError
from lorabbit.job.spec import JobSpec
from lorabbit.privacy.accountant import epsilon_of_steps
from lorabbit.types import ADAPTER, EVALUATE, INITIALIZE
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local
from lorabbit_client.analysis.per_example_gradients import ExampleGradients, separate_owners
from lorabbit_client.capabilities import TrainingLimits
from lorabbit_client.execution.interface import Cancelled, OnProgress, TaskInput
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.executor import Executor
from lorabbit_client.training.dp_trainer import DpTrainer, _add_clipped
from lorabbit_client.training.trainer import TrainingSchedule
from lorabbit_client.training.workspace import LearningWorkspace

MODELS = [
    ("tiny:bert", "text-classification", "lora"),
    ("tiny:gpt2", "causal-lm", "lora"),
    ("tiny:vit", "image-classification", "lora"),
    ("tiny:bert", "token-classification", "head"),
    ("tiny:bert", "text-classification", "bitfit"),
    ("tiny:albert", "text-classification", "lora"),
    ("tiny:deberta-v2", "text-classification", "lora"),
    ("tiny:deberta-v2", "text-classification", "head"),
]
PRIVACY = {"level": "example", "noise": 1.0, "clip": 0.1, "seeded": True}
DEMANDED = {**PRIVACY, "seeded": False}


def spec_of(folder: Path, name="tiny:bert", task="text-classification", trainable="lora", **more: Any) -> JobSpec:
    more.setdefault("privacy", PRIVACY)
    return job(
        folder,
        model={"name": name, "task": task, "trainable": trainable},
        data={**data_of(folder, task, 32), "max_length": 32},
        local={"steps": 3, "batch_size": 4, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": None},
        **more,
    )


def space_of(folder: Path, spec: JobSpec) -> LearningWorkspace:
    torch.set_num_threads(1)
    return LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"))


def moving_of(model: Any) -> dict[str, Any]:
    moving = model.parameters()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in moving.items():
            value.requires_grad = True
            if ".lora_B." in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return moving


def one_by_one(model, moving, batch):
    rows = [
        torch.autograd.grad(model(**{k: v[i : i + 1] for k, v in batch.items()}).loss, list(moving.values()))
        for i in range(len(batch["labels"]))
    ]
    return {name: torch.stack(values) for name, values in zip(moving, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize(("name", "task", "trainable"), MODELS)
def test_gradients_are_those_of_each_example_by_itself(name, task, trainable, tmp_path: Path):
    spec = spec_of(tmp_path, name, task, trainable)
    space = space_of(tmp_path, spec)
    model = space._model
    model.model.eval()
    moving = moving_of(model)
    batch = space._data(0, spec.clients).train.batch(np.arange(3))

    parts = list(gradients_of(model, moving, batch).of(batch))

    expected = one_by_one(model.model, moving, batch)
    for key in moving:
        found = torch.cat([part[key] for part in parts])
        assert torch.allclose(found, expected[key], atol=1e-5), key


def gradients_of(model, moving, batch) -> ExampleGradients:
    """What a private trainer finds out about a model."""

    def run(rows):
        return model.model(**rows)

    return ExampleGradients(run, moving, separate_owners(model.model, moving, run, batch))


@pytest.mark.parametrize(
    ("name", "trainable", "together"),
    [
        ("tiny:bert", "lora", True),
        ("tiny:bert", "bitfit", False),  # norms
        ("tiny:albert", "lora", True),  # one layer in every block
        ("tiny:deberta-v2", "lora", False),  # the table of positions passes through the queries' layer
        ("tiny:deberta-v2", "head", True),
    ],
)
def test_one_pass_serves_all_examples_where_they_stay_apart_in_every_layer(name, trainable, together, tmp_path: Path):
    spec = spec_of(tmp_path, name, trainable=trainable)
    space = space_of(tmp_path, spec)
    space._model.model.eval()
    batch = space._data(0, spec.clients).train.batch(np.arange(3))

    assert gradients_of(space._model, moving_of(space._model), batch).is_vectorized is together


class Rows(torch.nn.Module):
    """A model that looks at each example's numbers in an order of its own choice."""

    def __init__(self, look) -> None:
        super().__init__()
        self.linear, self.look = torch.nn.Linear(2, 3, bias=False), look

    def forward(self, x, labels):
        logits = self.look(self.linear, x)
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize(
    ("look", "apart"),
    [
        (lambda linear, x: linear(x).sum(1), True),
        (lambda linear, x: linear(x).sum(1) + linear(x.flip(1)).sum(1), True),
        (lambda linear, x: linear(x.transpose(0, 1)).sum(0), False),  # tokens first
        (lambda linear, x: linear(x).sum(1) + linear(torch.ones(4, 2)).sum(0), False),  # as many rows as examples
        (lambda linear, x: (x @ linear.weight.T).sum(1), False),  # a weight used without its layer
    ],
)
def test_a_layer_keeps_examples_apart_where_its_first_axis_follows_their_number(look, apart):
    model = Rows(look)
    tensors = dict(model.named_parameters())
    batch = {"x": torch.randn(4, 4, 2), "labels": torch.tensor([0, 1, 2, 0])}  # as many tokens as examples

    owners = separate_owners(model, tensors, lambda rows: model(**rows), batch)

    assert (owners is not None) is apart


def trainer_of(folder: Path, spec: JobSpec) -> DpTrainer:
    space = space_of(folder, spec)
    made = DpTrainer(
        space._model, space._data(0, spec.clients).train, spec.local, schedule=TrainingSchedule(1, 1), seed=5
    )
    made.privacy = spec.privacy
    return made


def test_one_example_moves_the_gradient_by_at_most_the_clip_over_the_batch(tmp_path: Path):
    spec = spec_of(tmp_path)
    trainer = trainer_of(tmp_path, spec)
    moving = moving_of(trainer._model)
    trainer._model.model.eval()
    found = []
    for positions in (np.arange(4), np.arange(3)):
        trainer._compute_gradients(positions, moving, 0)
        found.append(torch.cat([value.grad.flatten() for value in moving.values()]))

    moved = float((found[0] - found[1]).norm())

    assert 0 < moved <= 0.1 / 4 * (1 + 1e-4)


def test_a_step_without_examples_is_noise_of_the_deviation_that_the_job_says(tmp_path: Path):
    trainer = trainer_of(tmp_path, spec_of(tmp_path, privacy={**PRIVACY, "seeded": False}))
    moving = moving_of(trainer._model)

    trainer._compute_gradients(np.array([], dtype=np.int64), moving, 0)

    noise = torch.cat([value.grad.flatten() for value in moving.values()])
    assert float(noise.std()) == pytest.approx(0.1 / 4, rel=0.1)


@pytest.mark.parametrize("seeded", [True, False])
def test_every_example_is_drawn_by_itself_at_the_rate_of_the_batch(seeded, tmp_path: Path):
    trainer = trainer_of(tmp_path, spec_of(tmp_path, privacy={**PRIVACY, "seeded": seeded}))
    trainer.local = trainer.local.model_copy(update={"steps": 2000})

    _, drawn = trainer._batch_order(None)

    rows = len(trainer.examples)
    shares = np.bincount(np.concatenate(drawn), minlength=rows) / 2000
    assert np.allclose(shares, 4 / rows, atol=0.06)
    assert len({len(step) for step in drawn}) > 2


def test_statistics_of_batches_travel_as_they_came(tmp_path: Path):
    spec = spec_of(tmp_path, str(write_normed(tmp_path)), "image-classification", "full")
    session = space_of(tmp_path, spec).session(task_of(spec), PrivateState(), silent)
    begun = session.tensors()

    trained = session.train().tensors

    kept = {name for name, value in trained.items() if np.array_equal(value, begun[name])}
    statistics = {name for name in trained if name.rpartition(".")[2].startswith(("running_", "num_batches"))}
    assert kept == statistics != set()


def test_an_example_without_a_finite_gradient_adds_nothing_and_says_nothing():
    rows = torch.tensor([[3.0, 4.0], [math.inf, 0.0], [math.nan, 1.0], [0.03, 0.04]])
    sums = {"w": torch.zeros(2)}

    _add_clipped(sums, {"w": rows}, clip=0.1)

    assert torch.allclose(sums["w"], torch.tensor([0.09, 0.12]))


# ---- through a client ----
def train(
    folder: Path,
    spec: JobSpec,
    round_number: int = 1,
    *,
    executor: Executor | None = None,
    on_progress: OnProgress = silent,
    **order: Any,
):
    """Do a task of one client, whose folder keeps what earlier ones have left; of a process of its own if no other."""
    executor = executor or Executor(data_root=folder)
    kept = (folder / "private", folder / "privacy.json")
    adapter = folder / "adapter.safetensors"
    if not adapter.exists():
        Executor(data_root=folder).execute(TaskInput(task_of(spec, 0, INITIALIZE), {}, adapter, *kept), silent)
    task = task_of(spec, 0).model_copy(update={"round": round_number, "task": f"r{round_number}", **order})
    return executor.execute(TaskInput(task, {ADAPTER: adapter}, folder / task.task, *kept), on_progress)


def cost_of(folder: Path, *, steps: int) -> float:
    """Epsilon of so many steps of the jobs of this file."""
    rows = len(space_of(folder, spec_of(folder))._data(0, 2).train)
    return epsilon_of_steps(1.0, 4 / rows, steps, 1e-5)


def test_a_client_tells_what_it_has_spent_and_neither_loss_nor_labels(tmp_path: Path):
    write_reviews(tmp_path)
    spec = spec_of(tmp_path)
    rows = len(space_of(tmp_path, spec)._data(0, spec.clients).train)

    first, second = (train(tmp_path, spec, number) for number in (1, 2))

    assert first.error is None
    assert first.metrics.loss is None
    assert "label_counts" not in first.metrics.facts
    assert first.metrics.facts["privacy"]["epsilon"] == pytest.approx(
        epsilon_of_steps(1.0, 4 / rows, 3, 1e-5), rel=1e-5
    )
    assert second.metrics.facts["privacy"]["steps"] == 6


def test_a_client_refuses_what_its_budget_does_not_bear(tmp_path: Path):
    write_reviews(tmp_path)
    rows = len(space_of(tmp_path, spec_of(tmp_path))._data(0, 2).train)
    one, two = (epsilon_of_steps(1.0, 4 / rows, steps, 1e-5) for steps in (3, 6))
    spec = spec_of(tmp_path, privacy={**PRIVACY, "epsilon": (one + two) / 2})

    first, second = (train(tmp_path, spec, number) for number in (1, 2))

    assert first.metrics.facts["privacy"]["spent"] is True
    assert "another round would cost" in str(second.error)
    assert not second.bad_input


def test_a_budget_smaller_than_one_round_is_bad_input(tmp_path: Path):
    write_reviews(tmp_path)

    outcome = train(tmp_path, spec_of(tmp_path, privacy={**PRIVACY, "epsilon": 0.01}))

    assert outcome.bad_input
    assert str(outcome.error).startswith("privacy.epsilon: one round of 3 steps")


def test_a_method_that_names_its_batches_is_refused(tmp_path: Path):
    spec = spec_of(tmp_path)
    session = space_of(tmp_path, spec).session(task_of(spec), PrivateState(), silent)

    with pytest.raises(LoRAbbitError, match="names its batches"):
        session.train(batches=[[0, 1]])


def test_a_task_that_is_asked_for_again_is_another_release(tmp_path: Path):
    write_reviews(tmp_path)
    one = cost_of(tmp_path, steps=3)
    spec = spec_of(tmp_path, privacy={**DEMANDED, "epsilon": 1.01 * one})

    first, again = train(tmp_path, spec), train(tmp_path, spec)

    assert first.error is None
    assert "another round would cost" in str(again.error)


def test_what_a_crash_did_not_let_out_counts_and_a_training_that_was_called_off_does_not(tmp_path: Path):
    write_reviews(tmp_path)
    spec = spec_of(tmp_path, privacy=DEMANDED)

    def call_off(*_: object) -> None:
        raise Cancelled

    train(tmp_path, spec)
    with pytest.raises(Cancelled):
        train(tmp_path, spec, 2, on_progress=call_off)
    (tmp_path / "r1").unlink()
    third = train(tmp_path, spec)

    assert third.metrics.facts["privacy"]["steps"] == 6


# ---- what a client's owner demands ----
def test_the_owners_budget_holds_over_jobs_and_at_the_owners_delta(tmp_path: Path):
    write_reviews(tmp_path)
    one, two = (cost_of(tmp_path, steps=steps) for steps in (3, 6))
    spec = spec_of(tmp_path, privacy={**DEMANDED, "delta": 0.5, "epsilon": 100.0})
    executor = Executor(data_root=tmp_path, limits=TrainingLimits(epsilon=(one + two) / 2))

    first, second = (train(tmp_path, spec, executor=executor, job=name, task=name) for name in ("job-a", "job-b"))

    assert first.metrics.facts["privacy"]["spent"] is True
    assert str(second.error).startswith("LORABBIT_PRIVACY_EPSILON: another round would cost")
    assert not (tmp_path / "job-b").exists()


@pytest.mark.parametrize("privacy", [None, {"level": "client"}, PRIVACY])
def test_an_owner_who_demands_privacy_takes_part_in_no_job_without(privacy, tmp_path: Path):
    write_reviews(tmp_path)

    outcome = train(tmp_path, spec_of(tmp_path, privacy=privacy), executor=demanding(tmp_path))

    assert outcome.bad_input
    assert str(outcome.error).startswith("privacy: this client's owner demands noise from its own process")


def test_an_owner_who_demands_privacy_tells_no_scores(tmp_path: Path):
    write_reviews(tmp_path)
    spec = spec_of(tmp_path, privacy=DEMANDED)

    told, kept = (train(tmp_path, spec, phase=EVALUATE, executor=executor) for executor in (None, demanding(tmp_path)))

    assert told.metrics.values
    assert kept.error is None
    assert (kept.metrics.num_examples, kept.metrics.loss, kept.metrics.values) == (0, None, {})


def demanding(folder: Path) -> Executor:
    return Executor(data_root=folder, limits=TrainingLimits(epsilon=100.0))


def test_a_run_ends_with_a_sentence_when_its_clients_have_spent_their_budgets(tmp_path: Path):
    write_reviews(tmp_path)
    spec = spec_of(tmp_path, clients=2, rounds=5)
    rows = len(space_of(tmp_path, spec)._data(0, 2).train)
    budget = epsilon_of_steps(1.0, 4 / rows, 7, 1e-5)
    spec = spec_of(tmp_path, clients=2, rounds=5, privacy={**PRIVACY, "epsilon": budget})

    report = run_local(spec, tmp_path / "runs", compute=ComputeOptions(data_root=tmp_path, workers=1)).report

    assert report.status == "done"
    assert report.reason.startswith("privacy.epsilon: after round 2 of 5 no client may spend more")
    assert report.rounds[0].train_loss is None
