"""The registry of methods: adding one is a file in `shared_model` or `personal_model`, and a line here."""

from __future__ import annotations

from difflib import get_close_matches

from pydantic import ValidationError

from lorabbit.aggregation import partial_work
from lorabbit.errors import BadInput
from lorabbit.job import schedules
from lorabbit.job.spec import JobSpec
from lorabbit.job.validation import explain
from lorabbit.methods import compatibility
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model.fd import Fd
from lorabbit.methods.personal_model.fedkd import FedKd
from lorabbit.methods.personal_model.fedproto import FedProto
from lorabbit.methods.personal_model.fml import Fml
from lorabbit.methods.personal_model.lg_fedavg import LgFedAvg
from lorabbit.methods.personal_model.pfedlora import PFedLora
from lorabbit.methods.personal_model.standalone import Standalone
from lorabbit.methods.shared_model.adalora import AdaLora
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.methods.shared_model.federa import FeDeRA
from lorabbit.methods.shared_model.fedprox import FedProx
from lorabbit.methods.shared_model.fedsa_lora import FedSaLora
from lorabbit.methods.shared_model.ffa_lora import FfaLora
from lorabbit.methods.shared_model.fibecfed import FibecFed
from lorabbit.methods.shared_model.sa_fedlora import SaFedLora
from lorabbit.methods.shared_model.slora import SLora

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        FedAvg,
        FedProx,
        FfaLora,
        SaFedLora,
        FeDeRA,
        FibecFed,
        Standalone,
        PFedLora,
        LgFedAvg,
        Fml,
        FedKd,
        Fd,
        FedProto,
        AdaLora,
        FedSaLora,
        SLora,
    )
}


def build(job: JobSpec) -> Method:
    """Make the job's method from its settings; raises BadInput naming the path under ``method``."""
    name = job.method.name
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"method.name: there is no method {name!r}{hint} (methods: {', '.join(sorted(METHODS))})")
    try:
        method = METHODS[name].model_validate(job.method.settings, strict=False)
    except ValidationError as error:
        raise BadInput(explain(error, METHODS[name], prefix="method.")) from error
    if job.model.variants is not None and not METHODS[name].personal:
        ready = ", ".join(sorted(known for known in METHODS if METHODS[known].personal))
        raise BadInput(
            f"model.variants: clients of {name} share one model; leave it out, or take a method with own models"
            f" ({ready})"
        )
    _check_schedule(job, METHODS[name])
    method.check(job)
    partial_work.check(job, kinds=method.schedules, because=method.because)
    compatibility.check_joining(job, prepares=method.prepares)
    compatibility.check_robust(job, personal=method.personal, needs_each=method.needs_each)
    compatibility.check_privacy(job, personal=method.personal, prepares=method.prepares, needs_each=method.needs_each)
    compatibility.check_compression(
        job, personal=method.personal, keeps_coordinates="buffered" in method.schedules, absolute=method.absolute
    )
    return method.with_job(job)


def _check_schedule(job: JobSpec, method: type[Method]) -> None:
    """Raise BadInput where a schedule would break what the method's paper shows."""
    kind = schedules.kind_of(job.schedule)
    if kind not in method.schedules:
        ready = ", ".join(each for each in schedules.KINDS if each in method.schedules)
        raise BadInput(f"schedule: {method.name} does not run under {kind!r}: {method.because}; choose {ready}")
    if job.privacy is not None and kind != "sync":
        raise BadInput("schedule: the accountant of `privacy` counts rounds that wait for everybody; choose sync")
    if job.robust is not None and kind == "buffered":
        raise BadInput("schedule: `robust` compares the clients of one round, and buffered has none; choose sync")
    if schedules.takes_late(job.schedule) and "buffered" not in method.schedules:
        raise BadInput(f"schedule.late: {method.name} cannot keep late updates: {method.because}; set it to refuse")
