"""FedKD: an own mentor and a shared mentee distil into each other; updates of the mentee travel as low-rank factors.

Wu, Wu, Lyu, Huang, Xie, "Communication-efficient federated learning via knowledge distillation", Nature
Communications 13 (2022) (arXiv 2108.13323). With z the logits and r the representation of mentor (o) and
mentee (s), L_t = CE(z_o, y) + CE(z_s, y) as a number, and W a private linear map,

    (1)  L = CE(z_o, y) + CE(z_s, y) + [KL(z_s || z_o) + KL(z_o || z_s) + MSE(r_o, W r_s)] / L_t
    (2)  s_k - s = sum_i sigma_i u_i v_i^T of every matrix, cut to the least K with
         sum_{i<=K} sigma_i^2 / sum_i sigma_i^2 >= T(t),   T(t) = t_start + (t_end - t_start) t / rounds
    (3)  s <- s + sum_k (n_k / n) (s_k - s)

D1  The server checks uploads against known shapes, so K comes from the spectrum of the update that it
    folded last, for all clients alike. The updates of the first round travel whole.
D2  What is compressed is the round's update, which the paper calls a gradient, on the way up. On the way
    down the mentee travels whole, so that a client may miss rounds.
D3  Attention maps, which not every model has, take no part in (1). L_t gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors.arithmetic import is_floating
from lorabbit.training_session import Forward, PersonalSession
from lorabbit.types import ADAPTER, EVALUATE, Array, ClientProfile, ClientUpdate, Facts, Plan, ServerState, Tensors

ROLE = "shared"
PREFIX = "shared."
HIDDEN = "own.hidden"
"""W of (1), d_o x d_s."""
WHOLE, LEFT, RIGHT = "update.", "left.", "right."
Real = NDArray[np.float64]


class FedKd(Method):
    """Mentor and mentee, adaptive mutual distillation, updates cut by their singular values."""

    name: ClassVar[str] = "fedkd"
    summary: ClassVar[str] = "own mentors and a shared mentee distil mutually; its updates travel as SVD factors"
    paper: ClassVar[str] = "Wu et al., Communication-efficient FL via knowledge distillation, 2022, arXiv 2108.13323"
    because: ClassVar[str] = (
        "its update is compressed by the energy threshold of its round, and each "
        "mentor goes on whether or not the mentee is averaged"
    )
    personal: ClassVar[bool] = True

    t_start: float = Field(default=0.95, gt=0, le=1, description="share of an update's energy kept at first")
    t_end: float = Field(default=0.98, gt=0, le=1, description="share kept in the last round")
    shared_model: str | None = Field(
        default=None, description="name of the mentee; cnn:5 beside CNNs, else the first own model, when absent"
    )

    def check(self, job: JobSpec) -> None:
        """Only classifiers; T must not fall."""
        requirements.check(job, self.name)
        if self.t_end < self.t_start:
            raise BadInput(f"method.t_end: {self.t_end} is below t_start {self.t_start}; the share kept grows")

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:
        """The mentee as the job draws it."""
        session.add_model(ROLE, requirements.shared_model(self.job, self.shared_model))
        return session.tensors(PREFIX)

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:
        """(1), then (2)."""
        session.add_model(ROLE, requirements.shared_model(self.job, self.shared_model))
        start = dict(plan.payloads[ADAPTER])
        session.load(start)
        self._map(session)
        result = session.train(self._loss, moving=lambda name: requirements.is_own(name) or name.startswith(PREFIX))
        end = session.tensors(PREFIX)
        ranks = _ranks(plan.settings)
        sent: dict[str, Array] = {}
        for name in sorted(start):
            if is_floating(start[name]):
                moved = end[name].astype(np.float64) - start[name].astype(np.float64)
                sent |= _cut(name, moved, ranks.get(name))
        client = session.client
        return ClientUpdate(client.client, client.index, sent, result.num_examples, result.loss)

    def _map(self, session: PersonalSession) -> None:
        """Draw the first W, the identity where the widths agree."""
        if session.tensors(HIDDEN):
            return
        own, shared = session.width("representation"), session.width("representation", ROLE)
        seed = derive_seed(self.job.seed, self.name, "hidden", session.client.index)
        drawn = np.random.default_rng(seed).standard_normal((own, shared)) / math.sqrt(shared)
        session.load({HIDDEN: (np.eye(own) if own == shared else drawn).astype(np.float32)})

    def _loss(self, batch: Forward) -> Any:  # noqa: ANN401 - the session's own array kind
        """(1)."""
        own, shared = batch.logits(), batch.logits(ROLE)
        task = batch.cross_entropy(own) + batch.cross_entropy(shared)
        hidden = batch.mse(batch.representation(), batch.representation(ROLE) @ batch.tensor(HIDDEN).T)
        return task + (batch.kl(own, shared) + batch.kl(shared, own) + hidden) / batch.constant(task)

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """The own model is in place already."""

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """Nothing folded: updates travel whole."""
        return ServerState(dict(adapter), {"folded": 0, "ranks": {}})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """The mentee, and the K of every matrix."""
        return Plan(payloads={ADAPTER: state.tensors}, settings={"ranks": state.facts.get("ranks", {})})

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:  # noqa: ARG002 - the same for all
        """Factors of the matrices that are cut, other updates whole."""
        ranks, template = _ranks(state.facts), {}
        for name in sorted(state.tensors):
            if is_floating(state.tensors[name]):
                rows, columns = _matrix(state.tensors[name].shape)
                cut = ranks.get(name)
                if cut is None:
                    template[WHOLE + name] = np.zeros(state.tensors[name].shape, np.float32)
                else:
                    template[LEFT + name] = np.zeros((rows, cut), np.float32)
                    template[RIGHT + name] = np.zeros((cut, columns), np.float32)
        return template

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(3), and the K of the next round."""
        mean = _Mean({name: value.shape for name, value in state.tensors.items() if is_floating(value)})
        sent = 0
        for update in updates:
            mean.add(update)
            sent = sum(value.size for value in update.tensors.values())
        moved = mean.value()
        number = state.facts.get("folded")
        folded = (number if isinstance(number, int) else 0) + 1
        kept = self.t_start + (self.t_end - self.t_start) * min(1.0, folded / self.job.rounds)
        tensors = {
            name: (value.astype(np.float64) + moved[name]).astype(value.dtype) if name in moved else value
            for name, value in state.tensors.items()
        }
        ranks = {name: rank for name in sorted(moved) if (rank := _energy_rank(moved[name], kept)) is not None}
        report: Facts = {"threshold": kept, "sent_share": sent / max(1, sum(value.size for value in moved.values()))}
        return ServerState(tensors, {"folded": folded, "ranks": dict(ranks), "report": dict(report)})

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Nothing is needed: mentors are scored."""
        return Plan(EVALUATE)


@dataclass
class _Mean:
    """Weighted mean of updates that come whole or as factors, in float64."""

    shapes: dict[str, tuple[int, ...]]
    sums: dict[str, Real] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, update: ClientUpdate) -> None:
        """Take in one client's update; one without examples weighs nothing."""
        self.weight += update.num_examples
        for name, shape in self.shapes.items():
            if WHOLE + name in update.tensors:
                value: Real = update.tensors[WHOLE + name].astype(np.float64)
            else:
                left, right = update.tensors[LEFT + name], update.tensors[RIGHT + name]
                value = (left.astype(np.float64) @ right.astype(np.float64)).reshape(shape)
            self.sums[name] = self.sums.get(name, np.zeros(shape)) + update.num_examples * value

    def value(self) -> dict[str, Real]:
        """The mean."""
        return {name: value / self.weight for name, value in self.sums.items()} if self.weight else {}


def _ranks(facts: Facts) -> dict[str, int]:
    """K by name, of the matrices that are cut."""
    found = facts.get("ranks")
    return {name: rank for name, rank in found.items() if isinstance(rank, int)} if isinstance(found, dict) else {}


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor looked at as a matrix: a convolution's kernel lies in the columns."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _cut(name: str, update: Real, rank: int | None) -> dict[str, Array]:
    """(2) at a given K: sigma u and v of the largest singular values, or the update whole."""
    if rank is None:
        return {WHOLE + name: update.astype(np.float32)}
    left, sigma, right = np.linalg.svd(update.reshape(_matrix(update.shape)), full_matrices=False)
    factors = (left[:, :rank] * sigma[:rank], right[:rank])
    return {LEFT + name: factors[0].astype(np.float32), RIGHT + name: factors[1].astype(np.float32)}


def _energy_rank(update: Real, kept: float) -> int | None:
    """(2): the least K that keeps a share of the energy; None where factors would be no smaller."""
    rows, columns = _matrix(update.shape)
    if min(rows, columns) < 2:  # noqa: PLR2004 - a vector has no factors
        return None
    energy = np.cumsum(np.square(np.linalg.svd(update.reshape(rows, columns), compute_uv=False)))
    if not energy[-1] > 0:
        return None
    rank = int(np.searchsorted(energy / energy[-1], kept)) + 1
    return rank if rank * (rows + columns) < rows * columns else None
