"""Sessions and workspaces of own models: where classifiers are cut, what is kept, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from personal import CLASSES, LOCAL, REPRESENTATION, WIDTHS, Networks, data, job, session

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.personal_model.requirements import is_own
from lorabbit.methods.personal_model.standalone import Standalone
from lorabbit.methods.registry import METHODS, build
from lorabbit.protocol.messages import Task
from lorabbit_client.execution.interface import TaskInput
from lorabbit_client.execution.private_state import PrivateState, read_private, write_private
from lorabbit_client.executor import Executor
from lorabbit_client.models.cnn import Cnn
from lorabbit_client.models.loading import load_model
from lorabbit_client.models.source import ModelSource
from lorabbit_client.personal.models import SplitModel, widths_of
from lorabbit_client.personal.workspace import PersonalWorkspace

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[2, 40, 50, 60, 3], [2, 70, 3, 0, 0]])
MASK = (TOKENS > 0).long()


def own_loss(batch):
    return batch.cross_entropy(batch.logits())


def built(name, task):
    spec = JobSpec.model_validate({"model": {"name": name, "task": task}, "data": {"max_length": 16}})
    return load_model(spec, ModelSource("built-in", None, name), ("a", "b", "c")).model


# ---- where classifiers are cut ----
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_a_text_classifier_is_cut_without_changing_its_answer(name):
    model = built(f"tiny:{name}", "text-classification")
    split = SplitModel(model, name, 3)

    with torch.no_grad():
        view = split.view({"input_ids": TOKENS, "attention_mask": MASK, "labels": torch.zeros(2, dtype=torch.long)})
        expected = model(input_ids=TOKENS, attention_mask=MASK).logits

    assert torch.equal(view.logits(), expected)
    assert view.features().shape == (2, split.widths["features"])
    assert view.representation().shape == (2, split.widths["representation"])


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_the_last_layer_of_a_text_classifier_reads_the_representation(name):
    model = built(f"tiny:{name}", "text-classification")
    split = SplitModel(model, name, 3)
    last = model.get_submodule(split.last)

    with torch.no_grad():
        view = split.view({"input_ids": TOKENS, "attention_mask": MASK})

        assert torch.allclose(last(view.representation()), view.logits(), atol=1e-6)


def test_a_vision_transformer_is_cut_at_its_first_token():
    model = built("tiny:vit", "image-classification")
    split = SplitModel(model, "vit", 3)

    with torch.no_grad():
        view = split.view({"pixel_values": PIXELS})
        hidden = model.vit(PIXELS).last_hidden_state[:, 0]

    assert torch.allclose(view.features(), hidden, atol=1e-6)


@pytest.mark.parametrize(("name", "flat"), [("1", 800), ("2", 400), ("3", 800), ("4", 800), ("5", 800)])
def test_a_cnn_is_cut_at_its_flattened_convolutions_and_before_its_last_layer(name, flat):
    model = Cnn(name, 10)
    split = SplitModel(model, f"cnn:{name}", 10)

    with torch.no_grad():
        view = split.view({"pixel_values": PIXELS})

        assert view.features().shape == (2, flat)
        assert view.representation().shape == (2, 500)
        assert torch.equal(view.logits(), model(PIXELS).logits)
    assert split.last == "fc3"


@pytest.mark.parametrize("name", ["cnn:1", "cnn:2", "cnn:5", "tiny:bert", "tiny:gpt2", "tiny:distilbert"])
def test_widths_are_known_from_the_configuration_alone(name):
    model = Cnn(name[-1], 3) if name.startswith("cnn") else built(name, "text-classification")

    assert widths_of(name, ModelSource("built-in", None, name)) == SplitModel(model, name, 3).widths


def test_a_model_without_a_layer_that_answers_is_refused():
    with pytest.raises(BadInput, match=r"model\.name: 'odd' has no linear layer with 9 outputs"):
        SplitModel(Cnn("5", 3), "odd", 9)


# ---- what is kept ----
def test_an_own_model_survives_a_restart(tmp_path):
    state = read_private(tmp_path, "task-1")
    one = session(job(), private=state)
    one.train(own_loss, moving=is_own)
    kept = one.tensors("own.")
    write_private(tmp_path, "task-1", state)

    found = session(job(), models=Networks(), private=read_private(tmp_path, "task-2"), round_number=2)

    assert all(np.array_equal(value, kept[name]) for name, value in found.tensors("own.").items())


def test_a_task_that_is_executed_again_starts_from_the_model_before_it(tmp_path):
    first = read_private(tmp_path, "task-1")
    session(job(), private=first).train(own_loss, moving=is_own)
    write_private(tmp_path, "task-1", first)
    results = []
    for _ in range(2):
        state = read_private(tmp_path, "task-2")
        one = session(job(), private=state, round_number=2)
        one.train(own_loss, moving=is_own)
        write_private(tmp_path, "task-2", state)
        results.append(one.tensors("own."))

    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def test_training_what_is_shared_alone_keeps_no_own_model():
    state = PrivateState()
    one = session(job(), private=state)
    one.load({"shift": np.zeros(CLASSES, np.float32)})

    one.train(lambda batch: batch.cross_entropy(batch.logits() + batch.tensor("shift")), moving=lambda n: n == "shift")

    assert "own" not in state.tensors
    assert np.any(one.tensors("shift")["shift"])


def test_a_client_without_a_model_draws_its_own_and_no_other_client_s():
    models = Networks()

    first = session(job(), 0, models=models).tensors("own.")
    session(job(), 2, models=models).train(own_loss, moving=is_own)
    again = session(job(), 0, models=models).tensors("own.")
    other = session(job(), 2, models=models).tensors("own.")

    assert all(np.array_equal(value, again[name]) for name, value in first.items())
    assert not np.array_equal(first["own.trunk.0.weight"], other["own.trunk.0.weight"])


def test_a_kept_model_of_another_architecture_is_bad_input():
    state = PrivateState()
    session(job(), 0, private=state).train(own_loss, moving=is_own)

    with pytest.raises(BadInput, match=r"model\.variants: the own model that client-2 keeps.*shape"):
        session(job(), 1, private=state)


def test_a_client_without_examples_trains_nothing():
    one = session(job(), examples=0)

    result = one.train(own_loss, moving=is_own)

    assert (result.num_examples, result.steps) == (0, 0)
    assert np.isnan(result.loss)


# ---- tensors ----
def test_a_tensor_of_the_wrong_shape_is_refused_before_any_moves():
    one = session(job())
    before = one.tensors()
    wrong = {"own.classifier.2.bias": np.ones(CLASSES, np.float32), "own.trunk.0.bias": np.ones(99, np.float32)}

    with pytest.raises(Refused, match=r"own\.trunk\.0\.bias has shape \[99\], expected \[4\]"):
        one.load(wrong)

    assert all(np.array_equal(value, before[name]) for name, value in one.tensors().items())


def test_a_second_model_refuses_tensors_that_it_lacks():
    one = session(job())
    one.add_model("shared", "small")

    with pytest.raises(Refused, match=r"shared\.nothing"):
        one.load({"shared.nothing": np.zeros(1, np.float32)})


def test_widths_and_the_last_layer_are_told():
    one = session(job(), 1)

    assert (one.width("features"), one.widest("features")) == (WIDTHS[1], max(WIDTHS))
    assert (one.width("representation"), one.classes) == (REPRESENTATION, CLASSES)
    assert one.last_layer() == {"weight": "own.classifier.2.weight", "bias": "own.classifier.2.bias"}


# ---- training and looking ----
def test_two_streams_of_one_task_see_other_batches():
    found = []
    for stream in ("", "other"):
        one = session(job())
        one.train(own_loss, moving=is_own, stream=stream)
        found.append(one.tensors("own.classifier.2.weight"))

    assert not np.array_equal(found[0]["own.classifier.2.weight"], found[1]["own.classifier.2.weight"])


def test_a_gradient_term_is_added():
    local = {**LOCAL, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "steps": 1, "max_grad_norm": None}
    del local["epochs"]
    one = session(job(local=local))
    plain = session(job(local=local))
    plain.train(own_loss, moving=is_own)

    one.train(own_loss, moving=is_own, gradient_term=lambda _name, value, _start: 0 * value + 1)

    without = plain.tensors("own.classifier.2.bias")["own.classifier.2.bias"]
    assert np.allclose(one.tensors("own.classifier.2.bias")["own.classifier.2.bias"], without - 0.1, atol=1e-6)


def test_means_by_class_are_those_of_numpy_and_move_nothing():
    one = session(job())
    before = one.tensors()
    batch = data(0).train.batch(np.arange(12))

    means, counts = one.mean_by_class(lambda found: found.representation())

    with torch.no_grad():
        seen = one.ensemble.forward_view(batch).representation().numpy()
    labels = batch["labels"].numpy()
    assert counts.tolist() == [6, 6, 0]
    assert np.allclose(means[1], seen[labels == 1].mean(0), atol=1e-6)
    assert not means[2].any()
    assert all(np.array_equal(value, before[name]) for name, value in one.tensors().items())


# ---- the workspace over real models ----
DIGITS = {
    "model": {"variants": ["cnn:5", "cnn:2"], "task": "image-classification"},
    "data": {"source": "digits", "limit": 200},
    "method": {"name": "pfedlora"},
    "clients": 4,
}


def workspace(tmp_path, **changes):
    spec = JobSpec.model_validate({**DIGITS, **changes})
    return spec, PersonalWorkspace(spec, data_root=tmp_path, device=torch.device("cpu"))


def task_of(spec, index):
    return Task(
        job="job", task=f"train-{index}", client=f"client-{index}", index=index, population=4, round=1, attempt=1,
        epoch=1, phase="train", seed=index, payloads={}, settings={}, spec=spec,
    )  # fmt: skip


def opened(spec, space, index):
    return space.session(task_of(spec, index), PrivateState(), lambda *_: None)


def test_clients_take_the_variants_in_turn(tmp_path):
    spec, space = workspace(tmp_path)

    widths = [opened(spec, space, index).width("features") for index in range(4)]

    assert widths == [800, 400, 800, 400]
    assert opened(spec, space, 1).widest("features") == 800


def test_clients_of_one_architecture_begin_from_weights_of_their_own(tmp_path):
    spec, space = workspace(tmp_path)

    weights = [opened(spec, space, index).tensors("own.conv1.weight")["own.conv1.weight"] for index in (0, 2, 0)]

    assert not np.array_equal(weights[0], weights[1])
    assert np.array_equal(weights[0], weights[2])


def test_clients_of_one_architecture_are_warmed_together_since_few_encoded_copies_are_kept(tmp_path):
    _, space = workspace(tmp_path, model={"variants": ["cnn:5", "cnn:2", "tiny:vit"], "task": "image-classification"})

    space.preload(6, range(6))

    assert list(space._data) == [(0, 6), (3, 6), (1, 6), (4, 6), (2, 6), (5, 6)]


def test_a_second_model_is_the_same_on_every_client(tmp_path):
    spec, space = workspace(tmp_path)
    found = []
    for index in (0, 1):
        one = opened(spec, space, index)
        one.add_model("shared", "cnn:5")
        found.append(one.tensors("shared."))
        one.load({name: value + 1 for name, value in found[-1].items()})

    assert all(np.array_equal(value, found[1][name]) for name, value in found[0].items())


def test_a_second_model_that_reads_other_input_is_refused(tmp_path):
    model = {"variants": ["tiny:bert"], "task": "text-classification"}
    spec, space = workspace(tmp_path, model=model, data={"source": "stdlib-docs", "limit": 60})

    with pytest.raises(BadInput, match=r"method\.shared_model: 'tiny:gpt2' reads its input otherwise"):
        opened(spec, space, 0).add_model("shared", "tiny:gpt2")


@pytest.mark.parametrize("name", ["pfedlora", "fml", "fedkd", "fedproto", "fd", "lg-fedavg"])
def test_models_of_half_precision_train_and_send_finite_values(tmp_path, name):
    model = {"variants": ["cnn:5"], "task": "image-classification", "dtype": "bfloat16"}
    spec, space = workspace(tmp_path, model=model, method={"name": name}, local={"steps": 2, "batch_size": 8})
    one, method = opened(spec, space, 0), build(spec)
    state = method.start(method.initialize(one))

    update = method.local_update(method.plan(state, one.client), one)

    assert one.tensors("own.conv1.weight")["own.conv1.weight"].dtype.name == "bfloat16"
    assert all(np.isfinite(value.astype(np.float64)).all() for value in update.tensors.values())
    template = method.uploads(state, one.client)
    assert {n: v.dtype for n, v in update.tensors.items()} == {n: v.dtype for n, v in template.items()}


class Leaking(Standalone):
    """Sends what must stay."""

    def local_update(self, plan, session):
        return replace(super().local_update(plan, session), tensors=session.tensors("own."))


def test_no_method_can_send_a_tensor_of_the_own_model(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "standalone", Leaking)
    spec = JobSpec.model_validate({**DIGITS, "method": {"name": "standalone"}, "local": {"steps": 1}})
    work = TaskInput(task_of(spec, 0), {}, tmp_path / "out", tmp_path / "private", tmp_path / "privacy.json")

    outcome = Executor(device="cpu").execute(work, lambda *_: None)

    assert "belongs to this client alone" in (outcome.error or "")
    assert not (tmp_path / "out").exists()


def test_an_unknown_variant_is_bad_input(tmp_path):
    spec, space = workspace(tmp_path, model={"variants": ["cnn:5", "cnn:9"], "task": "image-classification"})

    with pytest.raises(BadInput, match="cnn:9"):
        opened(spec, space, 0).widest("features")
