"""Which jobs may promise privacy, decided when a job is read."""

from __future__ import annotations

from lorabbit.errors import BadInput
from lorabbit.jobspec import JobSpec
from lorabbit.privacy.accounting import epsilon_of_rounds


def check(job: JobSpec, *, personal: bool, prepares: bool, needs_each: str = "") -> None:
    """Raise BadInput where a job's noise would not give what it promises."""
    spec, name = job.privacy, job.method.name
    if spec is None:
        return
    if personal:
        raise BadInput(f"privacy: {name} works on models of the clients' own, and "
                       "noise is worked out for none of them; leave privacy out")  # fmt: skip
    if prepares:
        raise BadInput(f"privacy: {name} prepares by measuring the data without noise; leave privacy out")
    if needs_each:
        raise BadInput(f"privacy: {name} must see every update, since {needs_each}; leave privacy out")
    if job.schedule != "sync":
        raise BadInput("privacy: clients are counted, and budgets kept, by rounds in which each is at most once; set "
                       "schedule to 'sync'")  # fmt: skip
    if spec.level == "example":
        _check_examples(job)
        return
    if job.robust is not None:
        raise BadInput("privacy.level: 'client' clips and averages by itself; leave robust out")
    if job.aggregation not in {"factors", "freeze-a"} or job.model.lora.client_ranks is not None:
        raise BadInput("privacy.level: noise goes onto the mean of tensors of one shape; leave aggregation and "
                       "model.lora.client_ranks out")  # fmt: skip
    first = epsilon_of_rounds(spec.noise, 1, spec.delta)
    if spec.epsilon is not None and first > spec.epsilon:
        raise BadInput(f"privacy.epsilon: one round costs a client {first:.3g} with noise {spec.noise}, and the budget "
                       f"is {spec.epsilon}; raise privacy.noise or privacy.epsilon")  # fmt: skip


def _check_examples(job: JobSpec) -> None:
    if job.model.dtype != "float32":
        raise BadInput(f"model.dtype: noise is added in float32, not {job.model.dtype}; set it to 'float32', or leave "
                       "privacy out")  # fmt: skip
    if job.model.task == "question-answering":
        raise BadInput("privacy.level: a long text has several rows here, and noise is worked out for one row an "
                       "example; leave privacy out")  # fmt: skip
