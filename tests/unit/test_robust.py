"""Robust aggregation: exact geometry of products, closed forms of the rules, attacks, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile import ATTACKS, MODULE, RANK, SCALING, factors_of, job, regauged, run, start, times, update, world
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabbit import job_loader
from lorabbit.aggregation.client_side import FROZEN
from lorabbit.errors import BadInput, RunFailed
from lorabbit.job.spec import RobustSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.robust.defense import defend
from lorabbit.robust.geometry import CohortUpdates, norms, squared_distances
from lorabbit.robust.rules import krum_scores
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.types import ServerState
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local

KINDS = ("clip", "median", "trimmed-mean", "krum", "multi-krum")
HEAD = "classifier.weight"


def drawn(rng, rank=RANK, d_in=10, d_out=7):
    return Factors(rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank)))


def cohort_of(clients=6, seed=0):
    """A server and updates with factors and a dense head, all drawn."""
    rng = np.random.default_rng(seed)
    state = ServerState({HEAD: rng.normal(size=(2, 3)), **lora_math.write(MODULE, drawn(rng))})
    updates = []
    for k in range(clients):
        f = drawn(rng)
        given = update(k, f.a, f.b)
        updates.append(replace(given, tensors={HEAD: rng.normal(size=(2, 3)), **given.tensors}))
    return state, updates


def dense(tensors, scaling=SCALING):
    return lora_math.read(tensors, MODULE, scaling).product()


def points(state, updates):
    """Every update as one flat vector, the dense way."""
    return np.stack([
        np.concatenate([(dense(u.tensors, u.facts["scaling"]) - dense(state.tensors)).ravel(),
                        (u.tensors[HEAD] - state.tensors[HEAD]).ravel()])
        for u in updates
    ])  # fmt: skip


def defended(spec, state, updates):
    guarded, told = defend(spec, state, updates)
    return next(iter(guarded)).tensors, told


# ---- geometry ----
def test_inner_products_are_those_of_the_dense_changes():
    state, updates = cohort_of()

    gram = CohortUpdates(state, updates, SCALING).gram()

    flat = points(state, updates)
    assert np.allclose(gram, flat @ flat.T, rtol=1e-12, atol=1e-12)


def test_distances_are_those_of_the_dense_products():
    state, updates = cohort_of()

    found = squared_distances(CohortUpdates(state, updates, SCALING).gram())

    flat = points(state, updates)
    assert np.allclose(found, np.square(flat[:, None] - flat[None]).sum(-1))


def test_a_frozen_a_counts_in_the_norm_though_it_does_not_travel():
    rng = np.random.default_rng(1)
    a, b = lora_math.write(MODULE, drawn(rng)).items()
    state = ServerState(dict([b]), shared={FROZEN: dict([a])})
    sent = replace(update(0, a[1], b[1] + 1.0), tensors={b[0]: b[1] + 1.0})

    (length,) = norms(CohortUpdates(state, [sent], SCALING).gram())

    assert length == pytest.approx(np.linalg.norm(SCALING * np.ones((7, RANK)) @ a[1]))


def test_a_small_change_of_a_large_weight_keeps_its_norm():
    rng = np.random.default_rng(2)
    large = drawn(rng)
    state = ServerState(lora_math.write(MODULE, Factors(large.a * 1e4, large.b * 1e4)))
    sent = update(0, large.a * 1e4, large.b * 1e4 * (1 + 1e-9))

    (length,) = norms(CohortUpdates(state, [sent], SCALING).gram())

    assert length == pytest.approx(1e-9 * lora_math.norm(Factors(large.a * 1e4, large.b * 1e4, SCALING)), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), stretch=st.floats(-3, 3, allow_subnormal=False))
def test_another_gauge_of_any_update_changes_nothing(seed, kind, stretch):
    state, updates = cohort_of(7, seed=seed % 1000)
    rng = np.random.default_rng(seed)
    turned = [
        regauged(u, np.linalg.qr(rng.normal(size=(RANK, RANK)))[0] @ np.diag([10.0**stretch, 10.0**-stretch]))
        for u in updates
    ]
    turned = [replace(t, tensors={**t.tensors, HEAD: u.tensors[HEAD]}) for t, u in zip(turned, updates, strict=True)]
    spec = job(robust={"kind": kind})

    expected, _ = defended(spec, state, updates)
    found, _ = defended(spec, state, turned)

    assert np.allclose(dense(found), dense(expected), atol=1e-6)
    assert np.allclose(found[HEAD], expected[HEAD])


# ---- closed forms ----
def test_nobody_clipped_is_the_plain_mean_of_products_cut_to_the_servers_rank():
    state, updates = cohort_of()

    found, told = defended(job(robust={"norm": 1e9}), state, updates)

    mean = lora_math.stack([(1 / len(updates), factors_of(u)) for u in updates], SCALING)
    assert np.allclose(dense(found), lora_math.truncate(mean, RANK).factors.product())
    assert told["clipped"] == []


def test_clipping_scales_the_change_to_the_norm():
    state, updates = cohort_of(1)

    found, _ = defended(job(clients=1, aggregation="stack", robust={"norm": 0.5}), state, updates)

    change = points(state, [replace(updates[0], tensors=found)])
    assert np.linalg.norm(change) == pytest.approx(0.5)


def test_krum_takes_the_update_in_the_middle_of_the_crowd():
    flat = np.array([[0.0], [1.0], [1.1], [1.3], [50.0]])

    scores = krum_scores(flat @ flat.T, 1)

    assert scores.argmin() == 2


def test_multi_krum_averages_the_best_and_leaves_the_others_out():
    state, updates = cohort_of(7)
    updates[3] = times(updates[3], state, 50.0)
    updates[3] = replace(updates[3], tensors={**updates[3].tensors, HEAD: state.tensors[HEAD]})

    _, told = defended(job(robust={"kind": "multi-krum"}), state, updates)

    assert "client-3" in told["left_out"]
    assert len(told["left_out"]) == 3


def test_the_median_of_equal_updates_is_that_update():
    state, updates = cohort_of(1)
    same = [replace(updates[0], index=k, client=f"client-{k}") for k in range(5)]

    found, _ = defended(job(clients=5, robust={"kind": "median"}), state, same)

    assert np.allclose(dense(found), dense(updates[0].tensors))


def test_the_median_of_a_head_is_the_median_of_each_entry():
    state, updates = cohort_of(5)

    found, _ = defended(job(clients=5, robust={"kind": "median"}), state, updates)

    assert np.allclose(found[HEAD], np.median([u.tensors[HEAD] for u in updates], axis=0))


def test_a_trimmed_mean_of_a_head_ignores_the_ends():
    state, updates = cohort_of(5)

    found, _ = defended(job(clients=5, robust={"kind": "trimmed-mean", "trim": 0.2}), state, updates)

    middle = np.sort([u.tensors[HEAD] for u in updates], axis=0)[1:-1]
    assert np.allclose(found[HEAD], middle.mean(axis=0))


def test_a_client_that_claims_a_million_examples_counts_once():
    state, updates = cohort_of(5)
    boasting = [replace(updates[0], num_examples=10**6), *updates[1:]]
    spec = job(clients=5, robust={"norm": 1e9})

    expected, _ = defended(spec, state, updates)
    found, _ = defended(spec, state, boasting)

    assert np.array_equal(dense(found), dense(expected))


def test_a_client_that_claims_another_scaling_is_measured_with_it():
    state, updates = cohort_of(5)
    updates[1] = replace(updates[1], facts={"rank": RANK, "scaling": 1e6})

    _, told = defended(job(clients=5, robust={"kind": "clip"}), state, updates)

    assert told["norms"]["client-1"] > 1e5
    assert "client-1" in told["clipped"]


def test_a_round_without_examples_passes_untouched():
    state, updates = cohort_of(3)
    idle = [replace(u, num_examples=0) for u in updates]

    guarded, told = defend(job(clients=3, robust={"kind": "median"}), state, idle)

    assert list(guarded) == idle
    assert told == {}


def test_a_round_with_too_few_updates_ends_with_a_sentence():
    state, updates = cohort_of(7)
    few = [replace(u, num_examples=0) if u.index < 4 else u for u in updates]

    with pytest.raises(RunFailed, match=r"krum needs 5 updates with examples, and 3 came"):
        defend(job(robust={"kind": "krum"}), state, few)


# ---- attacks ----
def test_the_tiny_problem_is_learnt_without_attackers():
    accuracy, _ = run(job())

    assert accuracy > 0.85


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_spoils_the_plain_mean(attack):
    accuracy, _ = run(job(), attack)

    assert accuracy < 0.7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_defense_holds_against_an_attack(attack, kind):
    accuracy, _ = run(job(robust={"kind": kind}), attack)

    assert accuracy > 0.8


@pytest.mark.parametrize("kind", ["clip", "multi-krum"])
def test_the_report_names_the_attacker_in_every_round(kind):
    _, told = run(job(robust={"kind": kind}), ATTACKS["regauged_scaling"])

    assert all("client-2" in report["clipped" if kind == "clip" else "left_out"] for report in told)


def test_the_hidden_scaling_looks_harmless_to_a_norm_of_one_factor():
    _, shards = world()
    state = start()
    honest = update(0, np.ones((RANK, 10)), np.ones((3, RANK)))

    hidden = ATTACKS["regauged_scaling"](honest, state, shards[0])

    assert np.linalg.norm(factors_of(hidden).b) < np.linalg.norm(factors_of(honest).b)


# ---- every averaging method, and refusals ----
AVERAGING = sorted(name for name, method in METHODS.items() if not method.personal and not method.needs_each)


@pytest.mark.parametrize("name", AVERAGING)
def test_an_averaging_method_takes_a_defense(name):
    method = build(job(aggregation="factors", method={"name": name}, robust={"kind": "median"}))

    assert (method.name, method.job.robust.kind) == (name, "median")


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(AVERAGING)))
def test_another_method_refuses_a_defense_with_the_reason(name):
    spec = job(aggregation="factors", method={"name": name})
    spec = spec.model_copy(update={"robust": RobustSpec()})

    with pytest.raises(BadInput, match=r"^robust: "):
        build(spec)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"robust": {"kind": "krum"}, "clients": 4}, r"robust\.kind: krum needs 2 \* attackers \+ 3 = 5 clients"),
        ({"robust": {"kind": "krum", "attackers": 3}}, r"needs 2 \* attackers \+ 3 = 9 clients"),
        ({"robust": {"kind": "krum"}, "schedule": {"kind": "quorum", "quorum": 0.5}}, r"and a round has 4"),
        (
            {"robust": {}, "aggregation": "factors", "schedule": {"kind": "quorum", "late": "keep"}},
            r"^(robust|schedule)",
        ),
        ({"robust": {"kind": "median"}, "clients": 2}, r"median of fewer than 3 values"),
        ({"robust": {"kind": "trimmed-mean", "trim": 0.45}, "clients": 4}, r"robust\.trim: .* leaves nobody"),
        ({"robust": {"kind": "multi-krum", "keep": 5}}, r"robust\.keep: 5 of 7 clients"),
        ({"robust": {"kind": "median", "norm": 1.0}}, r"robust\.norm: median does not read it"),
        ({"robust": {}, "aggregation": "zero-padded"}, r"norm of their update, which an attacker chooses"),
        ({"robust": {}, "aggregation": "exact"}, r"choose 'svd' or 'stack'"),
    ],
)
def test_a_defense_that_would_mean_nothing_is_refused(more, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(job(**more))


# ---- in a run ----
def test_a_run_reports_what_its_defense_did_to_whom(tmp_path: Path):
    text = "model: {name: 'null:40KB'}\nrounds: 3\nclients: 4\nrobust: {kind: clip, norm: 0.0001}\n"

    report = run_local(job_loader.parse(text), tmp_path, compute=ComputeOptions()).report

    assert report.guarded == {client: {"clipped": 3} for client in report.clients}
    assert report.rounds[0].facts["robust"]["kind"] == "clip"


def test_a_client_whose_product_overflows_is_left_out():
    state, updates = cohort_of(5)
    updates[1] = replace(updates[1], facts={"rank": RANK, "scaling": 1e300})

    found, told = defended(job(clients=5, robust={"kind": "median"}), state, updates)

    assert told["left_out"] == ["client-1"]
    assert all(np.isfinite(value).all() for value in found.values())
