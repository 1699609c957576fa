"""pFedLoRA: a small homogeneous adapter carries knowledge between clients of unlike models.

Yi, Yu, Wang, Liu, Li, "pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning",
2023 (arXiv 2310.13283). With f = trunk_k(x), y1 = A(f) = B A f and y2 = head_k(f), in each round

    (1)  w_k  <- w_k - eta grad [mu l(y1, y) + (1 - mu) l(y2, y)]   the adapter frozen, mu in [0, 1/2]
    (2)  th_k <- th  - eta grad l(y1, y)                            the own model frozen
    (3)  th   =  sum_k (n_k / n) th_k,   n = sum of n_k over the cohort; A and B apart

R1  Where the adapter sits, (1) and (2) are reconstructions: see docs/methods/pfedlora.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec, LocalSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.training_session import Forward, Layer, PersonalSession
from lorabbit.types import ADAPTER, EVALUATE, Array, ClientProfile, ClientUpdate, Json, Plan, ServerState, Tensors

A, B = "adapter.lora_A", "adapter.lora_B"
ALIGN = "own.align"
"""Private linear map to the adapter's width, d_A x d_k."""
PREFIX = "adapter."
MOST_MU = 0.5


class PFedLora(Method):
    """Train the own model beside a frozen adapter, then the adapter beside the frozen model; average adapters."""

    name: ClassVar[str] = "pfedlora"
    summary: ClassVar[str] = "clients of unlike models share one small low-rank adapter and nothing else"
    paper: ClassVar[str] = "Yi et al., pFedLoRA: Model-Heterogeneous Personalized FL, 2023, arXiv 2310.13283"
    because: ClassVar[str] = (
        "each client's own model and its copy of the small adapter teach each other "
        "in turn, and go on whether or not the copy is averaged"
    )
    personal: ClassVar[bool] = True

    rank: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="of the adapter, whatever model.lora says; above the number of classes adds little",
    )
    mu: float = Field(
        default=0.5, ge=0, le=1, description="two_loss: weight of the adapter's loss in (1); 0 is standalone"
    )
    site: Literal["fc_stack", "head", "peft_slots"] = Field(
        default="fc_stack", description="beside the whole head, beside its last layer, or within attention layers"
    )
    slots: int = Field(default=2, ge=1, description="peft_slots: so many last blocks, at their query and value layers")
    combine: Literal["two_loss", "sum"] = Field(
        default="two_loss", description="mix two losses by mu, or add the adapter's logits to the own ones"
    )
    infer: Literal["local", "mix"] = Field(
        default="local", description="two_loss: answer by the own model, or by both mixed by mu"
    )
    align: Literal["pad", "linear"] = Field(
        default="pad", description="how a narrow model reaches the adapter's width: zeros, or a private linear map"
    )
    adapter_epochs: float | None = Field(default=None, gt=0, description="epochs of (2); those of (1) when absent")

    def check(self, job: JobSpec) -> None:
        """Only classifiers; mu at most 1/2; a sum has one answer."""
        requirements.check(job, self.name)
        if self.combine == "two_loss" and self.mu > MOST_MU:
            raise BadInput(
                f"method.mu: {self.mu} lets an adapter that knows little at first outweigh the own model's loss;"
                f" it is at most {MOST_MU}"
            )
        if self.combine == "sum" and "mu" in self.model_fields_set:
            raise BadInput("method.mu: with combine 'sum' there is one loss and none to weigh; leave it out")
        if self.combine == "sum" and self.infer == "mix":
            raise BadInput("method.infer: with combine 'sum' the answer is the sum already; leave it 'local'")
        if self.site == "peft_slots" and self.align == "linear":
            raise BadInput("method.align: factors in attention layers need models of one width; leave it 'pad'")

    @property
    def place(self) -> Layer:
        """What the adapter reads."""
        return "features" if self.site == "fc_stack" else "representation"

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:
        """A ~ N(0, 1 / d_A), and B ~ N(0, 1 / r), or zero where the adapter begins as the own answer."""
        if self.site == "peft_slots":
            return self._slotted(session)
        width, generator = session.widest(self.place), np.random.default_rng(derive_seed(self.job.seed, self.name))
        shape_a, shape_b = (self.rank, width), (session.classes, self.rank)
        down = generator.standard_normal(shape_a) / math.sqrt(width)
        up = generator.standard_normal(shape_b) / math.sqrt(self.rank)
        if self.combine == "sum":
            up = np.zeros(shape_b)
        return {A: down.astype(np.float32), B: up.astype(np.float32)}

    def _slotted(self, session: PersonalSession) -> Tensors:
        """A pair for each slot: A ~ N(0, 1 / d_in), B zero."""
        generator, made = np.random.default_rng(derive_seed(self.job.seed, self.name)), {}
        for slot, (_, d_in) in sorted(session.slots(self.slots).items()):
            made[f"{PREFIX}{slot}.lora_A"] = generator.standard_normal((self.rank, d_in)) / math.sqrt(d_in)
        made |= {
            f"{PREFIX}{slot}.lora_B": np.zeros((d, self.rank)) for slot, (d, _) in session.slots(self.slots).items()
        }
        return {name: value.astype(np.float32) for name, value in made.items()}

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:
        """(1), then (2) from the received adapter."""
        self._install(plan, session)
        first = session.train(self._own_loss, moving=requirements.is_own)
        second = session.train(
            self._adapter_loss, moving=lambda name: name.startswith(PREFIX), local=self._second(session.local),
            stream="adapter",
        )  # fmt: skip
        facts: dict[str, Json] = {"steps": first.steps, "adapter_steps": second.steps}
        if math.isfinite(second.loss):
            facts["adapter_loss"] = second.loss
        client = session.client
        return ClientUpdate(client.client, client.index, session.tensors(PREFIX), first.num_examples, first.loss, facts)

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """The own model, and with it the adapter where it takes part in the answer."""
        if self.combine == "sum":
            self._install(plan, session)
            session.predict_with(lambda batch: batch.softmax(self._sum(batch)))
        elif self.infer == "mix":
            self._install(plan, session)
            session.predict_with(self._mixed)

    def _install(self, plan: Plan, session: PersonalSession) -> None:
        """Put the global adapter beside the own model, with a first map to its width where one is wanted."""
        adapter = plan.payloads[ADAPTER]
        if self.site == "peft_slots":
            self._check_slots(adapter, session)
            session.load(adapter)
            return
        session.load(adapter)
        width, own = session.widest(self.place), session.width(self.place)
        if self.align == "linear" and own != width and not session.tensors(ALIGN):
            seed = derive_seed(self.job.seed, self.name, "align", session.client.index)
            drawn = np.random.default_rng(seed).standard_normal((width, own)) / math.sqrt(own)
            session.load({ALIGN: drawn.astype(np.float32)})

    def _check_slots(self, adapter: Tensors, session: PersonalSession) -> None:
        """Raise BadInput when this client's own model has slots of another shape."""
        for slot, (d_out, d_in) in session.slots(self.slots).items():
            shapes = [adapter[f"{PREFIX}{slot}.lora_{factor}"].shape for factor in "AB"]
            if shapes != [(self.rank, d_in), (d_out, self.rank)]:
                raise BadInput(
                    f"method.site: the layer at {slot} of {session.client.client}'s own model maps {d_in} to {d_out},"
                    f" and the adapter there maps {shapes[0][1]} to {shapes[1][0]}; give all clients models of one"
                    " width, or set it to 'fc_stack'"
                )

    def _second(self, local: LocalSpec) -> LocalSpec:
        if self.adapter_epochs is None:
            return local
        return local.model_copy(update={"epochs": self.adapter_epochs, "steps": None})

    # ---- maths of one batch ----
    def _adapter(self, batch: Forward) -> Any:  # noqa: ANN401 - the session's own array kind
        """y1 = B A f, or what the own model answers with the factors in its slots, (batch, classes)."""
        if self.site == "peft_slots":
            return batch.adapted(PREFIX)
        seen = batch.features() if self.site == "fc_stack" else batch.representation()
        down, up = batch.tensor(A), batch.tensor(B)
        width = down.shape[1]
        if self.align == "linear" and seen.shape[1] != width:
            seen = seen @ batch.tensor(ALIGN).T
        return batch.pad(seen, width) @ down.T @ up.T

    def _sum(self, batch: Forward) -> Any:  # noqa: ANN401
        """Within attention layers the factors are added there, and not to the answers."""
        return self._adapter(batch) if self.site == "peft_slots" else batch.logits() + self._adapter(batch)

    def _own_loss(self, batch: Forward) -> Any:  # noqa: ANN401
        """(1)."""
        if self.combine == "sum":
            return batch.cross_entropy(self._sum(batch))
        own = batch.cross_entropy(batch.logits())
        if not self.mu:
            return own
        return self.mu * batch.cross_entropy(self._adapter(batch)) + (1 - self.mu) * own

    def _adapter_loss(self, batch: Forward) -> Any:  # noqa: ANN401
        """(2)."""
        return batch.cross_entropy(self._sum(batch) if self.combine == "sum" else self._adapter(batch))

    def _mixed(self, batch: Forward) -> Any:  # noqa: ANN401
        """Probabilities mu softmax(y1) + (1 - mu) softmax(y2)."""
        return self.mu * batch.softmax(self._adapter(batch)) + (1 - self.mu) * batch.softmax(batch.logits())

    # ---- server ----
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:  # noqa: ARG002
        """(3)."""
        losses: list[tuple[int, float]] = []

        def weighed() -> Iterable[tuple[float, Tensors]]:
            for update in updates:
                loss = update.facts.get("adapter_loss")
                if isinstance(loss, float):
                    losses.append((update.num_examples, loss))
                yield update.num_examples, update.tensors

        mean: dict[str, Array] = weighted_mean(weighed())
        total = sum(number for number, _ in losses)
        report: dict[str, Json] = {}
        if total:
            report["adapter_loss"] = sum(number * loss for number, loss in losses) / total
        return ServerState(mean, {"report": report})

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:
        """The adapter, where it takes part in the answer."""
        if self.combine == "two_loss" and self.infer == "local":
            return Plan(EVALUATE)
        return super().scoring(state, client)
