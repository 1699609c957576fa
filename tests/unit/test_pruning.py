"""HetLoRA's pruning: what fades is given up, the rank that is left is planned, and the rest stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from doubles import QuadraticSession, profile

from lorabbit.aggregation.rank_pruning import pruning
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec, PruneSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.registry import METHODS, build
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.types import ADAPTER, ServerState

RANK, HEAD, MODULE = 4, "classifier.weight", "m.q"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def adapter(sizes: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> dict[str, Any]:
    """Factors whose component i has the size given."""
    scale = np.sqrt(np.array(sizes, np.float32))
    a = np.ones((len(sizes), 5), np.float32) * scale[:, None]
    b = np.ones((3, len(sizes)), np.float32) * scale
    return {HEAD: np.ones((2, 3), np.float32), **lora_math.write(MODULE, Factors(a, b))}


def method(name: str = "fedavg", **prune: Any) -> Method:
    model = {"lora": {"rank": RANK, "alpha": RANK, "prune": {"keep": 0.5, "weight": 0.0, **prune}}}
    return build(JobSpec.model_validate({"method": {"name": name}, "aggregation": "zero-padded", "model": model}))


def client(index: int, sizes: tuple[float, ...], **parts: Any) -> QuadraticSession:
    """A client whose data want components of these sizes."""
    return QuadraticSession(
        adapter(sizes), client=profile(index), steps=20, eta=0.5, base={MODULE: np.zeros((3, 5))}, **parts
    )


def one_round(made: Method, state: ServerState, sessions: list[QuadraticSession]) -> ServerState:
    updates = []
    for session in sessions:
        updates.append(made.local_update(made.plan(state, session.client), session))
        template = made.uploads(state, session.client)
        assert {n: v.shape for n, v in updates[-1].tensors.items()} == {n: v.shape for n, v in template.items()}
    return made.aggregate(state, iter(updates))


FADING, GROWING = (1.0, 1.0, 0.01, 0.01), (1.0, 1.0, 3.0, 3.0)


# ---- the penalty ----
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_the_penalty_pulls_the_components_that_may_go_and_nothing_else(kind: Any) -> None:
    found = pruning(PruneSpec(keep=0.5, weight=0.1), adapter())
    assert found is not None
    term, values = found.term(), {name: kind(value) for name, value in adapter().items()}

    pulls = {name: np.asarray(term(name, value, value)) for name, value in values.items()}

    assert not pulls[HEAD].any()
    assert not pulls[A][:2].any()
    assert not pulls[B][:, :2].any()
    np.testing.assert_allclose(pulls[A][2:], 0.1)
    np.testing.assert_allclose(pulls[B][:, 2:], 0.1)


def test_the_penalty_is_added_to_another_term() -> None:
    found = pruning(PruneSpec(keep=0.5, weight=0.1), adapter())
    assert found is not None
    both = found.term(lambda _, value, __: value * 0 + 7)

    np.testing.assert_allclose(both(A, adapter()[A], None)[:, 0], [7, 7, 7.1, 7.1], rtol=1e-6)


def test_the_gradient_is_that_of_half_the_squared_norms() -> None:
    found = pruning(PruneSpec(keep=0.5, weight=0.3), adapter())
    assert found is not None
    value = torch.tensor(adapter((1.0, 2.0, 3.0, 4.0))[B], requires_grad=True)

    (0.3 / 2 * value[:, 2:].square().sum()).backward()

    torch.testing.assert_close(found.term()(B, value.detach(), None), value.grad)


# ---- the choice ----
@pytest.mark.parametrize(("keep", "rank", "kept"), [(0.5, 4, 2), (0.99, 4, 3), (0.1, 4, 1), (0.75, 8, 6), (0.5, 3, 1)])
def test_at_least_one_component_goes_and_at_least_one_stays(keep: float, rank: int, kept: int) -> None:
    found = pruning(PruneSpec(keep=keep), adapter((1.0,) * rank))

    assert found is not None
    assert found.kept == kept


def test_a_single_component_stays_and_without_the_setting_all_do() -> None:
    assert pruning(PruneSpec(), adapter((1.0,))) is None
    assert pruning(None, adapter()) is None


def test_what_became_smaller_is_zero_in_the_upload_and_what_did_not_is_left_alone() -> None:
    found = pruning(PruneSpec(keep=0.5), adapter())
    assert found is not None

    smaller, given_up = found.applied(adapter(), adapter((9.0, 9.0, 0.9, 1.0)))
    larger, kept = found.applied(adapter(), adapter((0.1, 0.1, 1.0, 1.0)))

    assert given_up
    assert not smaller[A][2:].any()
    assert not smaller[B][:, 2:].any()
    np.testing.assert_array_equal(smaller[A][:2], adapter((9.0, 9.0, 0.9, 1.0))[A][:2])
    assert not kept
    np.testing.assert_array_equal(larger[A], adapter((0.1, 0.1, 1.0, 1.0))[A])


# ---- a federation ----
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_client_whose_last_components_fade_is_planned_fewer_and_the_other_one_all(name: str) -> None:
    made = method(name)
    state = made.start(adapter())

    state = one_round(made, state, [client(0, FADING), client(1, GROWING)])

    assert state.facts["ranks"] == {"client-1": 2}
    assert state.report["pruned"] == 1
    assert [made.plan(state, profile(k)).payloads[ADAPTER][B].shape[1] for k in range(2)] == [2, 4]
    assert made.plan(state, profile(0)).settings == {"rank": 2}


def test_ranks_go_down_to_one_and_stay_there() -> None:
    made, ranks = method(), []
    state = made.start(adapter())

    for _ in range(4):
        state = one_round(made, state, [client(0, (0.5, 0.25, 0.01, 0.01)), client(1, GROWING)])
        ranks.append(state.facts["ranks"].get("client-1"))  # type: ignore[union-attr]

    assert ranks == [2, 1, 1, 1]


def test_the_first_round_of_fresh_factors_gives_up_nothing() -> None:
    made, fresh = method(), adapter()
    fresh[B] = np.zeros_like(fresh[B])

    state = one_round(made, made.start(fresh), [client(0, FADING)])

    assert state.facts["ranks"] == {}


def test_a_pruned_rank_is_never_above_that_of_the_job() -> None:
    lora_spec = {"rank": RANK, "alpha": RANK, "client_ranks": [1, 4], "prune": {"keep": 0.5}}
    made = build(JobSpec.model_validate({"aggregation": "zero-padded", "model": {"lora": lora_spec}}))
    state = ServerState(adapter(), {"ranks": {"client-1": 2, "client-2": 3}})

    assert [made.plan(state, profile(k)).settings["rank"] for k in range(2)] == [1, 3]


# ---- what is refused ----
def test_only_padded_factors_are_pruned() -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.prune: .* it is 'svd'"):
        JobSpec.model_validate({"aggregation": "svd", "model": {"lora": {"prune": {}}}})


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"fedavg", "fedprox"}))
def test_methods_that_do_not_average_factors_as_the_job_says_refuse_to_prune(name: str) -> None:
    with pytest.raises(BadInput, match=r"^(aggregation|model\.lora\.prune): "):
        method(name)
