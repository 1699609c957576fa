"""pFedLoRA's adapter within attention layers: slots of models of unlike depth, and the invariants that hold there."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from personal import CLASSES, LOCAL, session
from transformers import AutoModelForSequenceClassification

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.personal_model.requirements import is_own
from lorabbit.methods.registry import build
from lorabbit.types import ADAPTER, Plan
from lorabbit_client.data.features import Features
from lorabbit_client.dataset import ClientData, Examples
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models.cnn import Cnn
from lorabbit_client.models.loading import quiet, seeded
from lorabbit_client.models.tiny import WIDTH, tiny_config
from lorabbit_client.personal.models import SplitModel, lora_hooks, slots_of
from lorabbit_client.personal.session import freeze
from lorabbit_client.tasks.registry import TASKS
from lorabbit_client.tasks.text_classification import ClassScorer

RANK = 2
SLOTS = {"0.query", "0.value", "1.query", "1.value"}
LAYERS_KEY = {"distilbert": "n_layers"}


def classifier(family="bert", layers=2, seed=0):
    """A tiny classifier of any depth."""
    config = tiny_config(family, num_labels=CLASSES)
    setattr(config, LAYERS_KEY.get(family, "num_hidden_layers"), layers)
    with quiet(), seeded(seed):
        return AutoModelForSequenceClassification.from_config(config).eval()


def batch(rows=3):
    generator = torch.Generator().manual_seed(rows)
    return {
        "input_ids": torch.randint(5, 300, (rows, 7), generator=generator),
        "attention_mask": torch.ones(rows, 7, dtype=torch.long),
        "labels": torch.arange(rows) % CLASSES,
    }


def pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        slot: (torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, RANK, generator=generator))
        for slot in sorted(SLOTS)
    }


# ---- where slots are ----
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit"])
@pytest.mark.parametrize("layers", [2, 4])
def test_models_of_any_depth_and_family_have_slots_of_the_same_names_and_shapes(family, layers):
    config = tiny_config(family, num_labels=CLASSES)
    setattr(config, LAYERS_KEY.get(family, "num_hidden_layers"), layers)
    kind = AutoModelForSequenceClassification
    if family == "vit":
        from transformers import AutoModelForImageClassification as kind  # noqa: PLC0415, N813 - for images alone
    found = slots_of(kind.from_config(config), family, 2)

    assert {slot: tuple(layer.weight.shape) for slot, layer in found.items()} == dict.fromkeys(SLOTS, (WIDTH, WIDTH))


def test_slots_are_counted_from_the_last_block():
    model = classifier(layers=4)
    found = slots_of(model, "bert", 2)

    assert found["0.query"] is model.bert.encoder.layer[2].attention.self.query
    assert found["1.value"] is model.bert.encoder.layer[3].attention.self.value


@pytest.mark.parametrize(
    "model", [classifier("gpt2"), classifier(layers=1), Cnn("5", CLASSES)], ids=["gpt2", "1", "cnn"]
)
def test_a_model_without_so_many_query_and_value_layers_is_refused(model):
    with pytest.raises(BadInput, match=r"method\.slots: 'it' has [01] attention blocks .* not 2"):
        slots_of(model, "it", 2)


@pytest.mark.parametrize("layers", [2, 4])
def test_factors_in_slots_answer_as_peft_s_lora_in_the_last_layers_does(layers):
    given, values = batch(), pairs()
    split = SplitModel(classifier(layers=layers), "bert", CLASSES)
    with torch.no_grad():
        answered = split.adapted(given, values)
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["query", "value"], layers_to_transform=[layers - 2, layers - 1],
        layers_pattern="layer",
    )  # fmt: skip
    with quiet():
        wrapped = get_peft_model(classifier(layers=layers), lora).eval()
    for slot, layer in slots_of(classifier(layers=layers), "bert", 2).items():
        number, role = slot.split(".")
        inner = wrapped.get_submodule(
            f"base_model.model.bert.encoder.layer.{layers - 2 + int(number)}.attention.self.{role}"
        )
        inner.lora_A["default"].weight.data = values[slot][0]
        inner.lora_B["default"].weight.data = values[slot][1]
        assert layer.in_features == WIDTH

    with torch.no_grad():
        expected = wrapped(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits

    assert torch.allclose(answered, expected, atol=1e-5)
    assert not torch.allclose(answered, split.view(given).logits(), atol=1e-2)


def test_slots_are_empty_again_afterwards():
    model = classifier()
    with lora_hooks(slots_of(model, "bert", 2), pairs()):
        pass

    assert not any(module._forward_hooks for module in model.modules())


# ---- the method with its adapter there ----
class Texts(Features):
    """Random tokens with a class that the first one tells."""

    def __init__(self, rows, seed):
        draw = np.random.default_rng(seed)
        self.classes = draw.integers(0, CLASSES, rows)
        self.tokens = draw.integers(50, 300, (rows, 5))
        self.tokens[:, 0] = 10 + self.classes

    def __len__(self):
        return len(self.classes)

    @property
    def lengths(self):
        return np.full(len(self), 5, np.int64)

    def batch(self, rows):
        tokens = torch.from_numpy(self.tokens[rows])
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.from_numpy(self.classes[rows]),
        }

    def scorer(self):
        return ClassScorer(CLASSES, positive=False)


class Depths:
    """Own models of two and of four layers."""

    def __init__(self):
        self.lent = {}

    def own(self, index, *, fresh):
        if fresh or index not in self.lent:
            self.lent[index] = SplitModel(freeze(classifier(layers=2 + 2 * (index % 2), seed=index)), "bert", CLASSES)
        return self.lent[index]

    def widest(self, place):  # noqa: ARG002 - one for both
        return WIDTH


def texts(index):
    return ClientData(
        train=Examples(Texts(20, index), np.arange(12), 12),
        test=Examples(Texts(20, index), np.arange(12, 20), 8),
        labels=("a", "b", "c"),
        label_counts={"a": 4, "b": 4, "c": 4},
        task=TASKS["text-classification"],
    )


def job(method="pfedlora", /, **settings):
    given = {"rank": RANK, "site": "peft_slots", **settings} if method == "pfedlora" else settings
    local = {**LOCAL, "learning_rate": 0.05, "max_grad_norm": 1.0}
    return JobSpec.model_validate(
        {"model": {"task": "text-classification"}, "method": {"name": method, **given}, "local": local, "rounds": 4}
    )


class Clients:
    """Two clients of unlike depth and their server."""

    def __init__(self, spec):
        self.spec, self.method, self.models = spec, build(spec), Depths()
        self.private = [PrivateState(), PrivateState()]
        self.state = self.method.start(self.method.initialize(self.open(0, 0)))

    def open(self, index, number=1):
        return session(
            self.spec, index, models=self.models, private=self.private[index], round_number=number, held=texts(index)
        )

    def update(self, index, number=1):
        one = self.open(index, number)
        return self.method.local_update(self.method.plan(self.state, one.client), one)

    def round(self, number=1):
        updates = [self.update(0, number), self.update(1, number)]
        self.state = self.method.aggregate(self.state, updates)
        return updates

    def own(self, index):
        return self.private[index].tensors.get("own")


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def test_J1_J2_each_phase_in_slots_moves_what_it_trains_and_nothing_else():
    clients = Clients(job(mu=0.5))
    one = clients.open(1)
    clients.method._install(Plan(payloads={ADAPTER: clients.state.tensors}), one)
    given, own = one.tensors("adapter."), one.tensors("own.")

    one.train(clients.method._own_loss, moving=is_own)
    moved = one.tensors("own.")
    assert same(one.tensors("adapter."), given)
    assert not same(moved, own)

    one.train(clients.method._adapter_loss, moving=lambda name: name.startswith("adapter."), stream="adapter")
    assert same(one.tensors("own."), moved)
    assert not same(one.tensors("adapter."), given)


def test_J3_J4_clients_of_unlike_depth_send_the_same_slots_and_nothing_more():
    sent = [update.tensors for update in Clients(job()).round()]

    names = {f"adapter.{slot}.lora_{factor}" for slot in SLOTS for factor in "AB"}
    assert set(sent[0]) == set(sent[1]) == names
    assert all(sum(value.nbytes for value in tensors.values()) == 4 * 4 * RANK * 2 * WIDTH for tensors in sent)


def test_J8_in_slots_without_mu_own_models_are_those_of_standalone_to_the_bit():
    slotted, standalone = Clients(job(mu=0)), Clients(job("standalone"))
    for number in (1, 2):
        slotted.round(number)
        standalone.round(number)

    assert all(same(slotted.own(index), standalone.own(index)) for index in range(2))


def test_J10_in_slots_a_sum_begins_as_the_own_answer():
    clients = Clients(job(combine="sum"))
    one = clients.open(1)
    clients.method._install(Plan(payloads={ADAPTER: clients.state.tensors}), one)

    with torch.no_grad():
        seen = one.ensemble.forward_view(batch())
        assert torch.equal(clients.method._sum(seen), seen.logits())


def test_in_slots_the_adapter_learns_over_rounds():
    clients = Clients(job())
    losses = []
    for number in range(1, 5):
        clients.round(number)
        losses.append(clients.state.report["adapter_loss"])

    assert losses[-1] < 0.8 * losses[0]


def test_models_of_unlike_width_are_refused_in_slots():
    clients = Clients(job())
    narrower = {n: v[:, :16] if n.endswith("lora_A") else v[:16] for n, v in clients.state.tensors.items()}
    clients.state = SimpleNamespace(tensors=narrower)

    with pytest.raises(BadInput, match=r"method\.site: the layer at 0\.query of client-1's own model maps 32 to 32"):
        clients.method._install(Plan(payloads={ADAPTER: narrower}), clients.open(0))


def test_a_private_map_to_one_width_is_refused_in_slots():
    with pytest.raises(BadInput, match=r"method\.align"):
        build(job(align="linear"))
