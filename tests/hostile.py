"""A tiny federation that learns with LoRA factors in NumPy, with clients who mean harm among it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.robust.defense import defend
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.types import ClientId, ClientUpdate, ServerState

MODULE, CLASSES, WIDTH, RANK, SCALING = "base_model.model.fc", 3, 10, 2, 2.0


def job(clients=7, **more):
    more.setdefault("aggregation", "svd")
    return JobSpec.model_validate(
        {"clients": clients, "model": {"lora": {"rank": RANK, "alpha": RANK * SCALING}}, **more}, strict=False
    )


def world(clients=7, rows=60, seed=0):
    """Rows of Gaussian features whose class is the largest of three linear scores: a test set and each client's own."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(CLASSES, WIDTH))

    def draw(count):
        x = rng.normal(size=(count, WIDTH))
        return x, (x @ truth.T).argmax(1)

    return draw(1000), [draw(rows) for _ in range(clients)]


def start(seed=0):
    rng = np.random.default_rng(seed)
    return ServerState(lora_math.write(MODULE, Factors(rng.normal(size=(RANK, WIDTH)) / 3, np.zeros((CLASSES, RANK)))))


def weight(state):
    return lora_math.read(state.tensors, MODULE, SCALING).product()


def accuracy(state, data):
    x, y = data
    return float(np.mean((x @ weight(state).T).argmax(1) == y))


def trained(state, index, data, steps=15, rate=0.3):
    """One client's honest work: gradient descent on the cross entropy, in the factors."""
    x, y = data
    f = lora_math.read(state.tensors, MODULE, SCALING)
    a, b = f.a.copy(), f.b.copy()
    for _ in range(steps):
        scores = SCALING * x @ (b @ a).T
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        gradient = SCALING * p.T @ x / len(y)
        a, b = a - rate * b.T @ gradient, b - rate * gradient @ a.T
    return update(index, a, b, len(y))


def update(index, a, b, examples=10):
    facts = {"rank": len(a), "scaling": SCALING}
    return ClientUpdate(
        ClientId(f"client-{index}"), index, lora_math.write(MODULE, Factors(a, b)), examples, 0.0, facts
    )


def cohort_like(clients, width=WIDTH, seed=0):
    """A server and updates near it, all drawn."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(RANK, width)), rng.normal(size=(CLASSES, RANK))
    updates = [update(k, a + rng.normal(size=a.shape), b + rng.normal(size=b.shape)) for k in range(clients)]
    return ServerState(lora_math.write(MODULE, Factors(a, b))), updates


def factors_of(given):
    return lora_math.read(given.tensors, MODULE, given.facts["scaling"])


def regauged(given, matrix):
    """The same product from other factors: (B R, R^-1 A)."""
    f = factors_of(given)
    return replace(given, tensors=lora_math.write(MODULE, Factors(np.linalg.solve(matrix, f.a), f.b @ matrix)))


def times(given, state, factor):
    """The change that a client asks for, times a factor, as factors of the rank that holds it."""
    change = lora_math.stack(
        [(1 - factor, lora_math.read(state.tensors, MODULE, SCALING)), (factor, factors_of(given))], SCALING
    )
    cut = lora_math.truncate(change, RANK).factors
    return replace(given, tensors=lora_math.write(MODULE, cut))


def sign_flip(given, state, _data):
    return times(given, state, -4.0)


def scaling(given, state, _data):
    return times(given, state, 100.0)


def regauged_scaling(given, state, _data):
    """A change a hundred times too long, hidden in a huge A and a tiny B."""
    return regauged(times(given, state, -100.0), np.diag([1e-6, 3e-6]))


def label_flip(given, state, data):
    x, y = data
    return times(trained(state, given.index, (x, (y + 1) % CLASSES), steps=40), state, 3.0)


ATTACKS = {f.__name__: f for f in (sign_flip, scaling, regauged_scaling, label_flip)}


def run(spec, attack=None, hostile=(2,), rounds=8, seed=0):
    """Accuracy after some rounds, and the reports of each."""
    test, shards = world(spec.clients, seed=seed)
    method, state, told = build(spec), start(seed), []
    for _ in range(rounds):
        updates = [trained(state, k, shard) for k, shard in enumerate(shards)]
        if attack is not None:
            updates = [attack(u, state, shards[u.index]) if u.index in hostile else u for u in updates]
        guarded, report = defend(spec, state, updates)
        state = method.aggregate(state, guarded)
        told.append(report)
    return accuracy(state, test), told
