"""A scripted client that does a method's own client half, on a session that can be solved on paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from doubles import QuadraticSession
from scripted_client import BASE, EXPORT, ScriptedClient

from lorabbit.broker.base import Broker
from lorabbit.methods.registry import build
from lorabbit.protocol.messages import Metrics, Offer, Task
from lorabbit.tensors import serialization
from lorabbit.types import EVALUATE, INITIALIZE, ClientId, ClientProfile, Facts, Plan, Tensors

RANK, INS, OUTS = 2, 3, 4


def first_adapter() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    return {
        "m.lora_A.weight": generator.standard_normal((RANK, INS)).astype(np.float32),
        "m.lora_B.weight": np.zeros((OUTS, RANK), np.float32),
        "classifier.weight": np.zeros((1, OUTS), np.float32),
    }


class MethodClient(ScriptedClient):
    """Its private state lives as long as it does."""

    def __init__(self, broker: Broker, address: str, folder: Path) -> None:
        super().__init__(broker, address, folder)
        self.private: dict[str, Any] = {}
        self.private_tensors: dict[str, Tensors] = {}

    def session(self, task: Task) -> QuadraticSession:
        k = float(task.index + 1)
        session = QuadraticSession(
            {name: np.full_like(value, k) for name, value in first_adapter().items()},
            num_examples=10 * (task.index + 1),
            client=ClientProfile(ClientId(task.client), task.index),
            private=self.private,
            private_tensors=self.private_tensors,
            round=task.round,
            seed=task.seed,
            scaling=2.0,
            whole={
                "m.weight": np.full((OUTS, INS), k, np.float32),
                "classifier.weight": np.ones((1, OUTS), np.float32),
            },
            base={"m": np.eye(OUTS, INS, dtype=np.float32) + np.float32(k)},
        )
        session.load(first_adapter())
        return session

    def finish(self, task: Task) -> None:
        method, session = build(task.spec), self.session(task)
        if task.phase == EVALUATE:
            self.tell(task, accuracy=0.5)
            return
        if task.phase == INITIALIZE:
            facts: Facts = {"main_metric": "accuracy", "rank": RANK, "export": EXPORT}
            self.answer(task, method.initialize(session), Metrics(num_examples=10, facts=dict(facts)))
            return
        payloads = {
            role: serialization.read_tensors(self.store.path(ref.sha256)) for role, ref in task.payloads.items()
        }
        update = method.local_update(Plan(task.phase, payloads, task.settings), session)
        loss = update.loss if math.isfinite(update.loss) else None
        metrics = Metrics(num_examples=update.num_examples, loss=loss, steps=1, facts=dict(update.facts))
        self.answer(task, update.tensors, metrics)

    def answer(self, task: Task, tensors: Tensors, metrics: Metrics) -> None:
        ref = self.store.add_tensors(tensors, chunk_bytes=1024) if tensors else None
        offer = Offer(**self.about(task), payload=ref, metrics=metrics, base_sha256=BASE)
        self.offers[task.task] = offer
        self.send(offer)
