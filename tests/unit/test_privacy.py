"""Differential privacy: the mechanism's closed form, the accountant, the budget, refusals, whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from hostile import cohort_like, job

from lorabbit import job_loader
from lorabbit.errors import BadInput
from lorabbit.methods.registry import METHODS, build
from lorabbit.privacy.accountant import epsilon_of_rounds, epsilon_of_steps
from lorabbit.privacy.gaussian_mechanism import normal, protect, spending
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local

PRIVATE = {"noise": 2.0, "clip": 0.5, "seeded": True}


def private(clients=4, **more):
    return job(clients, aggregation="factors", privacy={**PRIVATE, **more})


def tensors_of(spec, state, updates):
    return next(iter(protect(spec, state, updates))).tensors


def flat(tensors):
    return np.concatenate([np.ravel(tensors[name]) for name in sorted(tensors)])


# ---- mechanism ----
def test_with_hardly_any_noise_the_mean_is_that_of_the_clipped_changes():
    state, updates = cohort_like(4)
    spec = private(noise=1e-12)

    found = flat(tensors_of(spec, state, updates)) - flat(state.tensors)

    changes = [flat(u.tensors) - flat(state.tensors) for u in updates]
    clipped = [d * min(1.0, 0.5 / np.linalg.norm(d)) for d in changes]
    assert np.allclose(found, np.mean(clipped, axis=0), atol=1e-9)


def test_one_client_moves_the_mean_by_at_most_the_clip_over_the_number_of_clients():
    state, updates = cohort_like(4)
    absent = replace(updates[0], tensors=state.tensors)
    huge = replace(updates[0], tensors={name: value + 1e6 for name, value in state.tensors.items()})
    spec = private()

    without = flat(tensors_of(spec, state, [absent, *updates[1:]]))
    with_it = flat(tensors_of(spec, state, [huge, *updates[1:]]))

    assert np.linalg.norm(with_it - without) == pytest.approx(0.5 / 4)


def test_a_number_of_examples_has_no_weight():
    state, updates = cohort_like(4)
    spec = private()

    plain = tensors_of(spec, state, updates)
    boasting = tensors_of(spec, state, [replace(updates[0], num_examples=10**9), *updates[1:]])

    assert np.array_equal(flat(plain), flat(boasting))


def test_the_noise_of_the_mean_has_the_deviation_that_the_job_says():
    state, updates = cohort_like(4, width=4000)
    still = [replace(u, tensors=state.tensors) for u in updates]

    found = flat(tensors_of(private(seeded=False), state, still)) - flat(state.tensors)

    assert np.std(found) == pytest.approx(2.0 * 0.5 / 4, rel=0.05)


def test_noise_from_the_system_differs_every_time_and_noise_from_a_seed_never():
    state, updates = cohort_like(4)

    def twice(spec):
        return [flat(tensors_of(spec, state, updates)) for _ in range(2)]

    assert not np.array_equal(*twice(private(seeded=False)))
    assert np.array_equal(*twice(private(seeded=True)))


def test_system_noise_is_standard_normal():
    drawn = np.sort(normal((20_000,), 1.0))

    normal_share = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in drawn])
    steps = np.arange(1, 20_001) / 20_000
    assert np.abs(normal_share - steps).max() < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 0.1 %


# ---- accountant ----
def test_epsilon_of_one_round_is_close_above_the_exact_one():
    exact = dp_accounting.get_epsilon_gaussian(2.0, 1e-5)

    assert exact <= epsilon_of_rounds(2.0, 1, 1e-5) < 1.1 * exact


def test_rounds_of_one_mechanism_compose_as_one_of_less_noise():
    assert epsilon_of_rounds(2.0, 16, 1e-5) == pytest.approx(epsilon_of_rounds(0.5, 1, 1e-5))


def test_sampling_few_examples_costs_less_than_taking_all():
    assert epsilon_of_steps(1.0, 0.01, 100, 1e-5) < 0.1 * epsilon_of_steps(1.0, 1.0, 100, 1e-5)
    assert epsilon_of_steps(1.0, 0.01, 0, 1e-5) == 0.0


def test_spending_counts_the_rounds_of_each_client():
    state, updates = cohort_like(4)
    spec = private()
    facts, _ = spending(spec, state, updates)

    facts, told = spending(spec, replace(state, facts=facts), updates[:2])

    assert facts["participated"] == {"client-0": 2, "client-1": 2, "client-2": 1, "client-3": 1}
    assert told["epsilon"]["client-0"] == pytest.approx(epsilon_of_rounds(2.0, 2, 1e-5), rel=1e-5)
    assert told["epsilon"]["client-3"] == pytest.approx(epsilon_of_rounds(2.0, 1, 1e-5), rel=1e-5)


# ---- refusals ----
AVERAGING = sorted(n for n, m in METHODS.items() if not (m.personal or m.prepares or m.needs_each))


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("level", ["client", "example"])
def test_an_averaging_method_takes_noise(name, level):
    method = build(job(aggregation="factors", method={"name": name}, privacy={"level": level}))

    assert (method.name, method.job.privacy.level) == (name, level)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"privacy": {}, "aggregation": "svd"}, r"leave aggregation and model\.lora\.client_ranks out"),
        ({"privacy": {}, "robust": {}}, r"'client' clips and averages by itself; leave robust out"),
        ({"privacy": {"noise": 0.1, "epsilon": 1.0}}, r"one round costs a client .* raise privacy\.noise"),
        ({"privacy": {}, "method": {"name": "fibecfed"}}, r"prepares by measuring the data without noise"),
        ({"privacy": {}, "method": {"name": "adalora"}}, r"adalora must see every update"),
        ({"privacy": {}, "method": {"name": "standalone"}}, r"standalone works on models of the clients' own"),
        ({"privacy": {"level": "example"}, "model": {"dtype": "bfloat16"}}, r"model\.dtype: noise is added in float32"),
        ({"privacy": {"level": "example"}, "model": {"task": "question-answering"}}, r"several rows"),
    ],
)
def test_noise_that_would_not_give_what_it_promises_is_refused(more, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(job(**{"aggregation": "factors", **more}))


# ---- runs ----
RUN = "model: {name: 'null:40KB'}\nclients: 3\nrounds: 6\nprivacy: {noise: 4.0, epsilon: 2.0, seeded: true}\n"


def test_a_run_tells_epsilon_by_client_and_ends_with_a_sentence_when_the_budget_is_spent(tmp_path: Path):
    bearable = max(n for n in range(1, 7) if epsilon_of_rounds(4.0, n, 1e-5) <= 2.0)

    report = run_local(job_loader.parse(RUN), tmp_path, compute=ComputeOptions()).report

    assert 1 < bearable < 6
    assert (report.status, len(report.rounds)) == ("done", bearable)
    assert (
        report.reason == f"privacy.epsilon: after round {bearable} of 6 no client may spend more of its budget of 2.0"
    )
    assert report.rounds[-1].facts["privacy"]["epsilon"] == {
        client: pytest.approx(epsilon_of_rounds(4.0, bearable, 1e-5), rel=1e-5) for client in report.clients
    }
    assert report.final.metrics


def test_a_client_without_budget_is_asked_no_more_while_others_are(tmp_path: Path):
    report = run_local(job_loader.parse(RUN + "cohort: 2\n"), tmp_path, compute=ComputeOptions()).report

    asked = [client for round_ in report.rounds for client in round_.cohort]
    bearable = max(n for n in range(1, 7) if epsilon_of_rounds(4.0, n, 1e-5) <= 2.0)
    assert max(asked.count(client) for client in report.clients) <= bearable
    assert len(report.rounds) > bearable


def test_seeded_noise_makes_a_run_repeatable(tmp_path: Path):
    runs = [
        run_local(job_loader.parse(RUN), tmp_path, compute=ComputeOptions()).report.adapter.sha256 for _ in range(2)
    ]

    assert runs[0] == runs[1]


def test_real_noise_makes_every_run_another(tmp_path: Path):
    text = RUN.replace(", seeded: true", "")
    runs = [
        run_local(job_loader.parse(text), tmp_path, compute=ComputeOptions()).report.adapter.sha256 for _ in range(2)
    ]

    assert runs[0] != runs[1]
