"""FibecFed on a model of four blocks, file by file as clients do it: F6 to F8, F12 and F15 of its specification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning import job, silent, task_of, write_reviews
from transformers import BertModel

from lorabbit.job.spec import JobSpec
from lorabbit.methods.components import curriculum, layer_selection, sparse_masks
from lorabbit.methods.components.curriculum import CURRICULUM
from lorabbit.methods.components.layer_selection import OUTSIDE
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.fibecfed import FISHER, FibecFed
from lorabbit.protocol.messages import Metrics
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors import serialization
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN, ClientId, ClientProfile, ClientUpdate, Plan, ServerState
from lorabbit_cli.local.dry_run import dry_run
from lorabbit_cli.local.embedded_run import ComputeOptions
from lorabbit_client.execution.interface import TaskInput
from lorabbit_client.execution.private_state import PrivateState, read_private
from lorabbit_client.executor import Executor
from lorabbit_client.models.loading import seeded
from lorabbit_client.models.tiny import tiny_config, tiny_tokenizer

CLIENTS, BLOCKS, RANK, WIDTH = 4, 4, 4, 32


def model_of_four_blocks(folder: Path) -> Path:
    """A random BERT with weights of standard deviation 0.25, as its specification was tried on."""
    config: Any = tiny_config("bert")
    config.num_hidden_layers = BLOCKS
    assert config.initializer_range == 0.25
    with seeded(0):
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer("bert").save_pretrained(folder)
    return folder


def spec_of(folder: Path, method: dict[str, Any], **parts: Any) -> JobSpec:
    write_reviews(folder, copies=30)
    sections: dict[str, Any] = {
        "model": {
            "name": str(model_of_four_blocks(folder / "model")),
            "lora": {"rank": RANK, "alpha": 8, "targets": ["query", "value"]},
        },
        "data": {"partition": {"kind": "dirichlet", "alpha": 1.0, "min_examples": 16}},
        "local": {"epochs": 1, "steps": None, "batch_size": 8, "learning_rate": 0.01},
        "clients": CLIENTS,
        "method": method,
    }
    for name, value in parts.items():
        sections[name] = {**sections[name], **value} if isinstance(value, dict) and name in sections else value
    return job(folder, **sections)


@dataclass
class Federation:
    """A server's and its clients' work, one file for each message."""

    folder: Path
    spec: JobSpec
    executor: Executor = field(default_factory=Executor)

    def __post_init__(self) -> None:
        self.method = build(self.spec)
        self.files: list[Path] = []
        """Everything that traveled, in either direction."""
        self.told: list[Metrics] = []
        first = self.folder / "first.safetensors"
        self.run(
            TaskInput(task_of(self.spec, phase=INITIALIZE), {}, first, self.private(0), self.folder / "privacy.json")
        )
        self.state: ServerState = self.method.start(serialization.read_tensors(first))

    def private(self, index: int) -> Path:
        return self.folder / f"private-{index}"

    def kept(self, index: int) -> PrivateState:
        return read_private(self.private(index), "another task")

    def run(self, work: TaskInput) -> Metrics:
        outcome = self.executor.execute(work, silent)
        assert outcome.error is None, outcome
        return outcome.metrics

    def work(self, plan: Plan, number: int, index: int, phase: str = TRAIN) -> TaskInput:
        inputs = {}
        for role, tensors in plan.payloads.items():
            inputs[role] = self.folder / f"{role}-{phase}-{number}-{index}.safetensors"
            serialization.write_tensors(inputs[role], tensors)
            self.files.append(inputs[role])
        task = task_of(
            self.spec, index, phase, round=number, task=f"{phase}-{number}-{index}", settings=dict(plan.settings),
            seed=derive_seed(self.spec.seed, phase, number, index),
        )  # fmt: skip
        return TaskInput(
            task,
            inputs,
            self.folder / f"update-{number}-{index}.safetensors",
            self.private(index),
            self.folder / "privacy.json",
        )

    def round(self, number: int, cohort: Sequence[int] = range(CLIENTS)) -> list[ClientUpdate]:
        updates = []
        for index in cohort:
            client = ClientProfile(ClientId(f"client-{index + 1}"), index)
            work = self.work(self.method.plan(self.state, client), number, index)
            metrics = self.run(work)
            self.told.append(metrics)
            tensors = {}
            if work.output.exists():
                self.files.append(work.output)
                tensors = dict(serialization.read_tensors(work.output))
            updates.append(
                ClientUpdate(client.client, index, tensors, metrics.num_examples, metrics.loss or 0.0, metrics.facts)
            )
        self.state = self.method.aggregate(self.state, updates)
        return updates

    def score(self, number: int) -> float:
        """Mean held-out loss over all clients."""
        losses = []
        for index in range(CLIENTS):
            client = ClientProfile(ClientId(f"client-{index + 1}"), index)
            metrics = self.run(self.work(self.method.scoring(self.state, client), number, index, EVALUATE))
            if metrics.loss is not None:
                losses.append(metrics.loss)
        return float(np.mean(losses))


def fibecfed(folder: Path, knobs: dict[str, Any] | None = None, **parts: Any) -> Federation:
    method = {"name": "fibecfed", "probes": 4, "draws": 1, "n_fisher": 8, "warmup_steps": 2, **(knobs or {})}
    return Federation(folder, spec_of(folder, method, **parts))


def test_F6_with_every_block_shared_and_no_curriculum_the_run_is_fedavg_to_the_byte(tmp_path: Path) -> None:
    ends = []
    methods: list[dict[str, Any]] = [{"name": "fibecfed", "gal_ratio": 1.0, "pacing": "none"}, {"name": "fedavg"}]
    for method in methods:
        folder = tmp_path / method["name"]
        folder.mkdir()
        run = Federation(folder, spec_of(tmp_path, method))
        for number in range(0 if run.method.prepares else 1, 3):
            run.round(number)
        ends.append(run.method.adapter(run.state))

    assert ends[0].keys() == ends[1].keys()
    assert all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in ends[0])


def test_F7_only_shared_factors_and_the_head_travel_and_nothing_private_is_in_any_file(tmp_path: Path) -> None:
    run = fibecfed(tmp_path)
    run.round(0)
    assert run.files == []
    run.round(1)
    run.round(2)
    run.score(2)
    gal: Any = run.state.facts["gal"]
    sent = b"".join(path.read_bytes() for path in run.files)
    facts = repr([metrics.facts for metrics in run.told])

    for path in run.files:
        tensors = serialization.read_tensors(path)
        factors = {name for name in tensors if layer_selection.block_of(name) is not None}
        head = {name: value for name, value in tensors.items() if name not in factors}
        assert {layer_selection.block_of(name) for name in factors} == set(gal)
        assert all("classifier" in name for name in head)
        size = 4 * (len(gal) * 2 * RANK * (WIDTH + WIDTH) + sum(value.size for value in head.values()))
        assert sum(value.nbytes for value in tensors.values()) == size
    for index in range(CLIENTS):
        for group in (OUTSIDE, FISHER, CURRICULUM):
            for name, value in run.kept(index).tensors[group].items():
                assert value.tobytes() not in sent
                assert group == CURRICULUM or name.encode() not in sent
        for score in run.kept(index).tensors[CURRICULUM]["difficulty"].tolist():
            assert repr(score) not in facts


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)])
def test_F8_masked_rows_are_bit_identical_under_momentum_and_decay_and_the_others_move(
    optimizer: str, momentum: float, tmp_path: Path
) -> None:
    local = {"optimizer": optimizer, "momentum": momentum, "weight_decay": 0.1, "epochs": 2}
    run = fibecfed(tmp_path, {"update_share": 0.3}, local=local)
    run.round(0)
    run.round(1)
    before = [dict(run.kept(index).tensors[OUTSIDE]) for index in range(CLIENTS)]
    masks = [
        {name: sparse_masks.mask(value, 0.3, "neuron") for name, value in run.kept(index).tensors[FISHER].items()}
        for index in range(CLIENTS)
    ]

    updates = run.round(2)

    for index, update in enumerate(updates):
        after = run.kept(index).tensors[OUTSIDE]
        for name, mask in masks[index].items():
            still = ~np.broadcast_to(mask, after[name].shape)
            assert np.array_equal(after[name][still], before[index][name][still])
            assert np.any(after[name] != before[index][name])
        rows = sum(mask.size for mask in masks[index].values())
        moving = sum(-(-3 * mask.size // 10) for mask in masks[index].values())  # ceil(0.3 rows) in each matrix
        assert (update.facts["masked"], update.facts["maskable"]) == (rows - moving, rows)


def test_F9_every_row_of_a_shared_factor_may_move(tmp_path: Path) -> None:
    run = fibecfed(tmp_path, {"update_share": 0.3})
    run.round(0)
    before = run.state.tensors

    (update, *_) = run.round(1)

    assert all(np.all(np.any(update.tensors[name] != before[name], axis=1)) for name in before if ".lora_B." in name)


def test_F12_own_factors_fisher_and_order_survive_a_restart(tmp_path: Path) -> None:
    spec = fibecfed(tmp_path).spec
    ends = []
    for restart in (False, True):
        folder = tmp_path / f"restart-{restart}"
        folder.mkdir()
        again = Federation(folder, spec)
        for number in (0, 1, 2):
            if restart:
                again.executor = Executor()
            again.round(number)
        private = [dict(again.kept(index).tensors) for index in range(CLIENTS)]
        ends.append((dict(again.state.tensors), private))

    for name in ends[0][0]:
        assert np.array_equal(ends[0][0][name], ends[1][0][name])
    for index in range(CLIENTS):
        for group in (OUTSIDE, FISHER, CURRICULUM):
            here, there = (end[1][index][group] for end in ends)
            assert all(np.array_equal(here[name], there[name]) for name in here)


def test_a_task_that_is_done_again_gives_the_same_bytes_and_advances_the_fisher_once(tmp_path: Path) -> None:
    run = fibecfed(tmp_path)
    run.round(0)
    run.round(1)
    work = run.work(run.method.plan(run.state, ClientProfile(ClientId("client-1"), 0)), 2, 0)

    seen = []
    for _ in range(2):
        run.run(work)
        kept = run.kept(0).tensors
        seen.append((work.output.read_bytes(), {n: v.tobytes() for n, v in kept[FISHER].items()}))

    assert seen[0] == seen[1]


def test_a_client_scores_with_its_own_factors_and_another_one_with_untouched_ones(tmp_path: Path) -> None:
    run = fibecfed(tmp_path, {"sparse": False, "gal_ratio": 0.25}, local={"learning_rate": 0.05, "epochs": 4})
    run.round(0)
    run.round(1, cohort=[0])
    client = ClientProfile(ClientId("client-1"), 0)
    own = run.run(run.work(run.method.scoring(run.state, client), 1, 0, EVALUATE))
    untouched = Plan(EVALUATE, {"adapter": run.state.tensors}, {"evaluate": "global"})

    assert own.loss != run.run(run.work(untouched, 1, 0, EVALUATE)).loss


@pytest.mark.slow
def test_F15_the_loss_falls_and_the_batches_processed_are_those_of_the_pacing(tmp_path: Path) -> None:
    rounds = 16
    run = fibecfed(tmp_path, rounds=rounds, local={"learning_rate": 0.02})
    assert isinstance(run.method, FibecFed)
    run.round(0)
    start, processed, expected = run.score(0), 0, 0
    for number in range(1, rounds + 1):
        for update in run.round(number):
            share = curriculum.competence("linear", number - 1, rounds, beta=0.3, alpha=0.6)
            expected += curriculum.batches_used(share, -(-update.num_examples // 8))
            steps: Any = update.facts["steps"]
            processed += steps

    assert processed == expected
    assert run.score(rounds) < 0.7 * start


@pytest.mark.parametrize("rule", ["slq", "eigengap"])
def test_F13_a_measured_share_decides_how_many_blocks_are_shared_and_how_many_neurons_move(
    rule: str, tmp_path: Path
) -> None:
    run = fibecfed(tmp_path, {"gal_ratio": rule})
    answers = run.round(0)
    shares: list[Any] = [answer.facts["lossless_share"] for answer in answers]
    gal: Any = run.state.facts["gal"]
    pooled = layer_selection.lossless([(a.num_examples, share) for a, share in zip(answers, shares, strict=True)])

    for update, share in zip(run.round(1), shares, strict=True):
        kept = run.kept(update.index).tensors[FISHER]
        moving = sum(-(-share * len(value) // 1) for value in kept.values())
        masked, maskable = update.facts["masked"], update.facts["maskable"]
        assert isinstance(masked, int)
        assert isinstance(maskable, int)
        assert maskable - masked == moving

    assert len(gal) == layer_selection.enough(pooled, BLOCKS)


def test_with_an_update_share_of_zero_own_blocks_stand_still_and_nothing_is_measured_for_them(tmp_path: Path) -> None:
    run = fibecfed(tmp_path, {"update_share": 0.0})
    first = run.method.adapter(run.state)
    run.round(0)

    updates = run.round(1)

    for update in updates:
        kept = run.kept(update.index).tensors
        assert all(np.array_equal(value, first[name]) for name, value in kept[OUTSIDE].items())
        assert FISHER not in kept
        assert update.facts["masked"] == update.facts["maskable"]


def test_what_lies_below_the_lowest_block_that_moves_is_not_computed_again(tmp_path: Path) -> None:
    run = fibecfed(tmp_path, {"update_share": 0.0, "gal_pick": "random"}, rounds=10)
    run.round(0)
    run.round(1)
    gal: Any = run.state.facts["gal"]

    kept: list[Any] = [update.facts["prefixes_kept"] for update in run.round(2)]

    assert gal == [2, 3]  # by the job's seed: blocks 0 and 1 are frozen
    assert all(count > 0 for count in kept)


def test_a_half_precision_job_keeps_its_own_factors_in_the_dtype_of_the_wire(tmp_path: Path) -> None:
    run = fibecfed(tmp_path, model={"dtype": "bfloat16"})
    for number in (0, 1, 2):
        run.round(number)

    kept = run.kept(0).tensors

    assert {value.dtype.name for value in kept[OUTSIDE].values()} == {"bfloat16"}
    assert {value.dtype.name for value in kept[FISHER].values()} == {"float32"}
    assert any(np.any(value > 0) for value in kept[FISHER].values())


def test_the_forecast_of_a_round_is_what_then_travels(tmp_path: Path) -> None:
    run = fibecfed(tmp_path)
    found = dry_run(run.spec, ComputeOptions())
    run.round(0)

    run.round(1)
    up = [path for path in run.files if path.name.startswith("update-1-")]
    down = [path for path in run.files if path.name.startswith("adapter-train-1-")]

    assert found.round_bytes_up == sum(path.stat().st_size for path in up)
    assert CLIENTS * found.payload.down_first == sum(path.stat().st_size for path in down)
