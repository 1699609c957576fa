"""Methods that use what few methods use: a preparation, shared groups, updates without tensors, own exports."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from lorabbit.methods.api.method import Method
from lorabbit.methods.registry import METHODS
from lorabbit.types import ADAPTER, BASE, EVALUATE, ClientUpdate, Plan, ServerState


class Surveying(Method):
    """Round 0 counts examples and makes a base of them; later rounds take over what the first client sends.

    Every other client brings no tensors. Every walk over the updates must give the same.
    """

    name: ClassVar[str] = "surveying"
    summary: ClassVar[str] = "a method for tests"
    paper: ClassVar[str] = "none"
    prepares: ClassVar[bool] = True
    quorum: float = 1.0

    def plan(self, state, client):
        if not state.shared:
            return Plan(settings={"survey": True})
        return Plan(payloads={BASE: state.shared[BASE], ADAPTER: state.tensors}, settings={"index": client.index})

    def uploads(self, state, client):
        return state.tensors if state.shared and client.index == 0 else {}

    def aggregate(self, state, updates):
        told = {"rank": 2, "aggregation_error": 0.5, "answers": [u.index for u in updates]}
        if not state.shared:
            base = {"w": np.arange(600, dtype=np.float32) + sum(u.num_examples for u in updates)}
            return ServerState(state.tensors, {"report": told}, {BASE: base})
        assert [u.index for u in updates] == [u.index for u in updates]
        sums = state.tensors
        for update in updates:
            sums = {name: update.tensors[name] for name in sums} if update.tensors else sums
        return replace(state, tensors=sums, facts={"report": told})

    def scoring(self, state, client):  # noqa: ARG002
        return Plan(EVALUATE, {ADAPTER: state.tensors, BASE: state.shared[BASE]}, {"told": 7})

    def export(self, state):
        config = {"r": state.report.get("rank"), "lora_alpha": 16}
        return replace(super().export(state), config=config, base=state.shared.get(BASE))

    def local_update(self, plan, session):
        return ClientUpdate(session.client.client, session.client.index, plan.payloads, 1, 0.0)


class Hoarding(Surveying):
    """Clients keep models of their own; the server averages nothing."""

    name: ClassVar[str] = "hoarding"
    prepares: ClassVar[bool] = False
    personal: ClassVar[bool] = True

    def plan(self, state, client):  # noqa: ARG002
        return Plan()

    def uploads(self, state, client):  # noqa: ARG002
        return {}

    def aggregate(self, state, updates):
        assert all(not u.tensors for u in updates)
        return state

    def scoring(self, state, client):  # noqa: ARG002
        return Plan(EVALUATE)

    def export(self, state):
        return Method.export(self, state)


def register(monkeypatch):
    """Make them methods that jobs can name."""
    for method in (Surveying, Hoarding):
        monkeypatch.setitem(METHODS, method.name, method)
