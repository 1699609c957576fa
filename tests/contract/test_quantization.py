"""Frozen weights in eight or four bits: a client's memory falls, its adapter still learns, other jobs are refused."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, silent, task_of, write_reviews
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lorabbit.job.spec import JobSpec
from lorabbit.types import ADAPTER, INITIALIZE
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.execution.interface import TaskInput
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.executor import Executor
from lorabbit_client.models.quantization import BLOCK, QuantizedLinear
from lorabbit_client.training.evaluation import evaluate
from lorabbit_client.training.workspace import LearningWorkspace

LEVELS = {"int8": 127, "int4": 7}
BITS = {"int8": 8.25, "int4": 4.25}
MODELS = [("tiny:bert", "text-classification"), ("tiny:gpt2", "causal-lm"), ("tiny:llama", "causal-lm")]


def workspace(spec: JobSpec, folder: Path, quantisation: str, **more: Any) -> LearningWorkspace:
    torch.set_num_threads(1)
    limits = TrainingLimits(quantisation=quantisation, **more)
    return LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"), limits=limits)


def session_of(space: LearningWorkspace, spec: JobSpec) -> Any:
    return space.session(task_of(spec), PrivateState(), silent)


def spec_of(folder: Path, name: str = "tiny:bert", task: str = "text-classification", **more: Any) -> JobSpec:
    return job(folder, model={"name": name, "task": task}, data=data_of(folder, task), **more)


def bytes_of(model: nn.Module) -> int:
    return sum(value.nbytes for value in [*model.parameters(), *model.buffers()])


def layer(rows: int, columns: int, kind: str = "linear") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made: Any = nn.Linear(columns, rows) if kind == "linear" else Conv1D(rows, columns)
        nn.init.normal_(made.bias)
    return made.requires_grad_(requires_grad=False)


# ---- one layer ----


@pytest.mark.parametrize("codec", LEVELS)
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (5, 7), (1, 1)])
def test_a_weight_is_off_by_half_a_level_of_its_block_at_most(codec: str, rows: int, columns: int):
    whole = layer(rows, columns)

    found = QuantizedLinear(whole, codec).weight

    flat = functional.pad(whole.weight.reshape(-1), (0, -whole.weight.numel() % BLOCK)).reshape(-1, BLOCK)
    away = functional.pad((found - whole.weight).reshape(-1), (0, -whole.weight.numel() % BLOCK)).reshape(-1, BLOCK)
    scales = flat.abs().amax(dim=1) / LEVELS[codec] * (1 + 2**-7)
    assert found.shape == whole.weight.shape
    assert bool((away.abs().amax(dim=1) <= scales / 2 * (1 + 1e-6)).all())
    assert codec == "int8" or rows == 1 or bool(away.abs().any())


@pytest.mark.parametrize("codec", LEVELS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_answers_and_hands_gradients_back_as_one_with_the_rounded_weight(codec: str, kind: str):
    whole = layer(24, 40, kind)
    quantized = QuantizedLinear(whole, codec)
    with torch.no_grad():
        whole.weight.copy_(quantized.weight)
    value = torch.linspace(-1, 1, 3 * 40).reshape(3, 40).requires_grad_()

    answers = [each(value) for each in (whole, quantized)]
    gradients = [torch.autograd.grad(answer.square().sum(), value, create_graph=True)[0] for answer in answers]
    twice = [torch.autograd.grad(gradient.square().sum(), value)[0] for gradient in gradients]

    for first, second in (answers, gradients, twice):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_no_wide_weight():
    kept: list[int] = []
    quantized = QuantizedLinear(layer(64, 64), "int4")
    value = torch.ones(2, 64, requires_grad=True)

    with torch.autograd.graph.saved_tensors_hooks(lambda seen: kept.append(seen.numel()) or seen, lambda seen: seen):
        quantized(value).sum().backward()

    assert value.grad is not None
    assert max(kept, default=0) < 64 * 64


# ---- one model ----


@pytest.mark.parametrize("codec", LEVELS)
@pytest.mark.parametrize(("name", "task"), MODELS)
def test_frozen_linear_weights_take_the_bits_that_they_are_said_to(codec: str, name: str, task: str, tmp_path: Path):
    spec = spec_of(tmp_path, name, task)
    whole, less = (workspace(spec, tmp_path, each)._model for each in ("none", codec))

    layers = [module for module in less.model.modules() if isinstance(module, QuantizedLinear)]
    counts = [module.in_features * module.out_features for module in layers]
    padded = sum(-(-count // BLOCK) * BLOCK for count in counts)

    assert sum(counts) > 0.1 * whole.base_parameters
    assert bytes_of(whole.model) - bytes_of(less.model) == 4 * sum(counts) - padded * BITS[codec] / 8
    held = {id(value) for value in [*less.model.parameters(), *less.model.buffers()]}
    assert less.base is not None
    assert all(id(value) in held for value in less.base.tensors.values())
    assert less.base_sha256 == whole.base_sha256
    assert less.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(less.tensors[key], whole.tensors[key]) for key in whole.tensors)


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.03), ("int4", 0.5)])
@pytest.mark.parametrize(("name", "task"), MODELS)
def test_a_models_answers_stay_close(codec: str, most: float, name: str, task: str, tmp_path: Path):
    spec = spec_of(tmp_path, name, task)
    spaces = [workspace(spec, tmp_path, each) for each in ("none", codec)]
    examples = spaces[0]._data(0, spec.clients).train
    with torch.no_grad():
        whole, less = (space._model.model(**examples.batch(np.arange(4))).logits for space in spaces)

    away = float((less - whole).norm() / whole.norm())

    assert 0 < away < most


@pytest.mark.parametrize("codec", LEVELS)
@pytest.mark.parametrize("limits", [{}, {"dtype": "bfloat16"}, {"max_batch": 3}])
@pytest.mark.parametrize(("name", "task"), MODELS)
def test_every_factor_learns_over_quantized_weights(
    codec: str, limits: dict[str, Any], name: str, task: str, tmp_path: Path
):
    spec = spec_of(tmp_path, name, task, local={"steps": 3})
    session = session_of(workspace(spec, tmp_path, codec, **limits), spec)
    before = session.tensors()

    after = session.train().tensors

    assert all(not np.array_equal(before[key], after[key]) for key in before if ".lora_" in key)


def test_rank_curvature_importance_and_sensitivity_work_over_quantized_weights(tmp_path: Path):
    spec = spec_of(tmp_path)
    session = session_of(workspace(spec, tmp_path, "int4"), spec)

    found = [
        0 < session.lossless_share("eigengap") <= 1,
        any(value.any() for value in session.importance().values()),
        any(value.any() for value in session.fisher([0, 1]).values()),
    ]
    session.set_rank(2)

    assert all(found)
    assert {value.shape[0] for key, value in session.tensors().items() if ".lora_A" in key} == {2}


def test_private_examples_are_learnt_over_quantized_weights(tmp_path: Path):
    privacy = {"level": "example", "noise": 1.0, "clip": 0.1, "seeded": True}
    spec = spec_of(tmp_path, privacy=privacy, local={"steps": 2, "optimizer": "sgd", "max_grad_norm": None})
    session = session_of(workspace(spec, tmp_path, "int8"), spec)
    before = session.tensors()

    assert any(not np.array_equal(before[key], value) for key, value in session.train().tensors.items())


@pytest.mark.parametrize("codec", LEVELS)
def test_operations_count_as_without_quantisation(codec: str, tmp_path: Path):
    spec = spec_of(tmp_path, local={"steps": 2})
    flops = []
    for each in ("none", codec):
        space = workspace(spec, tmp_path, each)
        session = session_of(space, spec)
        with space.count_flops() as counted:
            session.train()
        flops.append(counted.flops)

    assert flops[1] == flops[0] > 0


@pytest.mark.parametrize("name", ["tiny:bert", "tiny:llama"])
def test_an_adapter_learnt_over_four_bits_is_as_good_on_the_whole_model(name: str, tmp_path: Path):
    spec = spec_of(tmp_path, name, local={"steps": 40})
    learned = session_of(workspace(spec, tmp_path, "int4"), spec).train().tensors

    found = []
    for codec in ("none", "int4"):
        space = workspace(spec, tmp_path, codec)
        session = session_of(space, spec)
        session.load(learned)
        found.append(evaluate(session.prepared_model(), space._data(0, spec.clients).train, 64, on_progress=silent))

    assert min(each.values["accuracy"] for each in found) >= 0.9


# ---- one client ----


def sha256_of(spec: JobSpec, folder: Path, limits: TrainingLimits) -> str:
    executor = Executor(data_root=folder, device="cpu", limits=limits)
    start, end = folder / "start.safetensors", folder / "end.safetensors"
    executor.execute(
        TaskInput(task_of(spec, phase=INITIALIZE), {}, start, folder / "private", folder / "privacy.json"), silent
    )
    executor.execute(
        TaskInput(task_of(spec), {ADAPTER: start}, end, folder / "private", folder / "privacy.json"), silent
    )
    return hashlib.sha256(end.read_bytes()).hexdigest()


@pytest.mark.parametrize("codec", LEVELS)
def test_the_same_seed_gives_the_same_adapter_twice(codec: str, tmp_path: Path):
    spec = spec_of(tmp_path)

    found = [sha256_of(spec, tmp_path, TrainingLimits(quantisation=codec)) for _ in range(2)]

    assert found[0] == found[1] != sha256_of(spec, tmp_path, UNLIMITED)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"model": {"trainable": "full"}}, "the job trains 'full'"),
        ({"model": {"trainable": "bitfit"}}, "the job trains 'bitfit'"),
        ({"model": {"trainable": "head"}}, "the job trains 'head'"),
        ({"aggregation": "stack"}, "aggregation 'stack' changes the base model"),
        ({"aggregation": "exact"}, "aggregation 'exact' changes the base model"),
        ({"method": {"name": "federa"}}, "federa works on"),
        ({"method": {"name": "slora"}}, "slora works on"),
        ({"method": {"name": "sa-fedlora"}}, "sa-fedlora works on"),
        (
            {"method": {"name": "sa-fedlora", "initiating": "lora", "shrink": "merge-reinit"}},
            "sa-fedlora works on",
        ),
        ({"method": {"name": "standalone"}}, "models of their own"),
    ],
)
def test_a_job_that_needs_the_whole_base_is_refused_by_a_quantized_client(
    parts: dict[str, Any], why: str, tmp_path: Path
):
    write_reviews(tmp_path)
    executor = Executor(data_root=tmp_path, device="cpu", limits=TrainingLimits(quantisation="int4"))
    work = TaskInput(
        task_of(job(tmp_path, **parts), phase=INITIALIZE),
        {},
        tmp_path / "out",
        tmp_path / "private",
        tmp_path / "privacy.json",
    )

    outcome = executor.execute(work, silent)

    assert outcome.bad_input
    assert outcome.error is not None
    assert re.fullmatch(f"LORABBIT_QUANTISATION: int4 .*{why}.*; set it to none for such jobs", outcome.error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "ffa-lora", "fedsa-lora", "adalora"])
def test_methods_that_leave_the_base_alone_run_on_a_quantized_client(name: str, tmp_path: Path):
    spec = spec_of(tmp_path, method={"name": name}, local={"steps": 2})

    TrainingLimits(quantisation="int8").check_job(spec)
    space = workspace(spec, tmp_path, "int8")

    assert session_of(space, spec).train().steps == 2
