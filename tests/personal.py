"""Clients with models of their own, small enough to follow: points in a plane, and two-layer networks in torch.

The sessions are the real ones; what is small is the data and the models that they are given.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.protocol.messages import Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.types import TRAIN
from lorabbit_client.data.features import Features
from lorabbit_client.dataset import ClientData, Examples
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models.loading import seeded
from lorabbit_client.personal.models import SplitModel
from lorabbit_client.personal.session import TorchPersonalSession, freeze
from lorabbit_client.tasks.registry import TASKS
from lorabbit_client.tasks.text_classification import ClassScorer

CLASSES, REPRESENTATION = 3, 5
WIDTHS = (4, 7)
"""Of the trunks of clients with even and with odd index."""
SHARED_WIDTH = 2
LOCAL = {"epochs": 2, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.001}


class Points(Features):
    """Points in a plane with a class each."""

    def __init__(self, points, classes):
        self.points, self.classes = np.asarray(points, np.float32), np.asarray(classes, np.int64)

    def __len__(self):
        return len(self.classes)

    @property
    def lengths(self):
        return np.ones(len(self), np.int64)

    def batch(self, rows):
        return {"points": torch.from_numpy(self.points[rows]), "labels": torch.from_numpy(self.classes[rows])}

    def scorer(self):
        return ClassScorer(CLASSES, positive=False)


class Network(nn.Module):
    """A trunk with statistics and dropout, and a head of two layers."""

    def __init__(self, width, *, statistics):
        super().__init__()
        norm = nn.BatchNorm1d(width) if statistics else nn.Identity()
        self.trunk = nn.Sequential(nn.Linear(2, width), norm, nn.Tanh(), nn.Dropout(0.1))
        self.classifier = nn.Sequential(nn.Linear(width, REPRESENTATION), nn.Tanh(), nn.Linear(REPRESENTATION, CLASSES))

    def forward(self, points):
        return SimpleNamespace(logits=self.classifier(self.trunk(points)))


def network(width, *seed, statistics=True):
    with seeded(derive_seed(0, *seed)):
        return SplitModel(freeze(Network(width, statistics=statistics)), f"network of {width}", CLASSES)


class Networks:
    """One module of each architecture for all clients, as a process has them."""

    def __init__(self, *, statistics=True):
        self.lent, self.statistics = {}, statistics

    def own(self, index, *, fresh):
        width = WIDTHS[index % len(WIDTHS)]
        if fresh or width not in self.lent:
            self.lent[width] = network(width, "own", index, statistics=self.statistics)
        return self.lent[width]

    def second(self, name, index):  # noqa: ARG002 - one for all
        return network(SHARED_WIDTH, "second", statistics=self.statistics)

    def widest(self, place):
        return max(WIDTHS) if place == "features" else REPRESENTATION


def job(method="pfedlora", /, **changes):
    """A job of three clients."""
    settings = {"rank": 2} if method == "pfedlora" else {}
    given = {"method": {"name": method, **settings, **changes.pop("method", {})}, "local": LOCAL, "rounds": 4}
    return JobSpec.model_validate({**given, **changes})


def data(index, examples=12):
    """The points of a client: those of classes k and k + 1, drawn around a corner of their own."""
    generator = np.random.default_rng(index)
    classes = np.array([(index + i % 2) % CLASSES for i in range(examples + 8)])
    corners = np.array([[2.0, 0.0], [-2.0, 1.0], [0.0, -2.0]])
    points = Points(corners[classes] + 0.3 * generator.standard_normal((len(classes), 2)), classes)
    rows = np.arange(len(classes))
    counts = np.bincount(classes[:examples], minlength=CLASSES)
    return ClientData(
        train=Examples(points, rows[:examples], examples),
        test=Examples(points, rows[examples:], 8),
        labels=("a", "b", "c"),
        label_counts={label: int(n) for label, n in zip("abc", counts, strict=True)},
        task=TASKS["image-classification"],
    )


def session(spec, index=0, *, models=None, private=None, round_number=1, phase=TRAIN, examples=None, held=None):  # noqa: PLR0913
    """A session for a task of a client; `private` carries its state from task to task, `held` is its data."""
    task = Task(
        job="job",
        task=f"{phase}-{round_number}-{index}",
        client=f"client-{index + 1}",
        index=index,
        population=3,
        round=round_number,
        attempt=1,
        epoch=1,
        phase=phase,
        seed=derive_seed(spec.seed, phase, round_number, index),
        payloads={},
        settings={},
        spec=spec,
    )
    found = held or (data(index) if examples is None else data(index, examples))
    private = PrivateState() if private is None else private
    return TorchPersonalSession(task, models or Networks(), found, private=private, on_progress=lambda *_: None)


class Federation:
    """Three clients and a server without anything between them."""

    def __init__(self, spec, *, statistics=True):
        self.spec, self.method = spec, build(spec)
        self.models, self.private = Networks(statistics=statistics), [PrivateState() for _ in range(3)]
        self.state = self.method.start(self.method.initialize(self.open(0, 0)))

    def open(self, index, round_number=1):
        return session(
            self.spec, index, models=self.models, private=self.private[index], round_number=round_number,
            examples=12 + 4 * index,
        )  # fmt: skip

    def update(self, index, round_number=1):
        one = self.open(index, round_number)
        return self.method.local_update(self.method.plan(self.state, one.client), one)

    def round(self, number, clients=(0, 1, 2)):
        """Let clients train in the order given, and fold what they bring in that of their indices."""
        updates = {index: self.update(index, number) for index in clients}
        self.state = self.method.aggregate(self.state, [updates[index] for index in sorted(updates)])
        return updates

    def own(self, index):
        """A client's own model as it is kept."""
        return self.private[index].tensors.get("own")
