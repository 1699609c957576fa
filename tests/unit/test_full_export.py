"""What stands beside a fully trained model travels as plain JSON."""

from __future__ import annotations

import json

import torch

from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics
from lorabbit_client.models.loading import load_model
from lorabbit_client.models.source import resolve
from lorabbit_client.models.trainable import make_trainable


def test_the_configuration_of_a_fully_trained_model_is_admitted_as_a_fact():
    spec = JobSpec.model_validate({"model": {"name": "tiny:bert", "trainable": "full"}})
    model = make_trainable(spec, load_model(spec, resolve("tiny:bert"), ("no", "perhaps", "yes")), torch.device("cpu"))

    metrics = Metrics(num_examples=1, facts={"export": dict(model.export)})

    files = json.loads(metrics.model_dump_json())["facts"]["export"]["files"]
    assert files["config.json"]["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
