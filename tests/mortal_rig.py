"""The real server and real clients that really train, on one loop, and ways to kill either at a moment of the job.

A server dies between two effects (`server_rig.Fuse`), counted from an event of the job. A client dies while a task
trains, or once it has written what only it holds and before it has noted that the task is done. Whoever is started
again has the folder of the one before, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from server_rig import Died, Fuse, Rig

from lorabbit.config.settings import ClientSettings
from lorabbit.events.job_events import AnyEvent
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit_client.agent.agent import Agent
from lorabbit_client.execution.interface import OnProgress, TaskInput, TaskResult
from lorabbit_client.execution.runners import InlineRunner
from lorabbit_client.executor import Executor


@dataclass(frozen=True, slots=True)
class Moment:
    """So many effects of the server after an event, for the `nth` time that it happens."""

    kind: str
    round: int | None = None
    phase: str | None = None
    nth: int = 1
    effects: int = 1

    def is_of(self, event: AnyEvent) -> bool:
        """Tell whether an event is the one that is meant."""
        return event.kind == self.kind and all(
            wanted is None or getattr(event, name, None) == wanted
            for name, wanted in (("round", self.round), ("phase", self.phase))
        )


class LateFuse(Fuse):
    """Begins to count at an event."""

    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self.moment = moment
        self._left = moment.nth

    def hear(self, event: AnyEvent) -> None:
        if self.moment.is_of(event):
            self._left -= 1
            if self._left == 0:
                self.at = self.count + self.moment.effects


@dataclass(slots=True)
class Fate:
    """When one client dies: in a task of this round and phase, while it trains or once private state is written."""

    address: str
    round: int
    phase: str
    after_writing: bool
    is_done: bool = False

    def is_of(self, address: str, work: TaskInput) -> bool:
        task = work.task
        return not self.is_done and (address, task.round, task.phase) == (self.address, self.round, self.phase)


class Mortal:
    """An executor that meets its fate."""

    def __init__(self, executor: Executor, address: str, fate: Fate | None) -> None:
        self._executor, self._address, self._fate = executor, address, fate

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        fate = self._fate
        if fate is None or not fate.is_of(self._address, work):
            return self._executor.execute(work, on_progress)
        if fate.after_writing:
            self._executor.execute(work, on_progress)
            fate.is_done = True
            raise Died

        def die(_fraction: float, _loss: float | None) -> None:
            fate.is_done = True
            raise Died

        return self._executor.execute(work, die)


class MortalRig(Rig):
    """See the module's docstring; clients that live share one executor."""

    def __init__(self, folder: Path, spec: JobSpec, executor: Executor, fate: Fate | None = None) -> None:
        super().__init__(folder, clients=0)
        self.spec, self.executor, self.fate = spec, executor, fate
        self.agents: dict[str, Agent] = {}
        self.deaths = 0

    def start_agent(self, address: str, executor: Executor) -> None:
        folder = self.folder / "clients" / address
        settings = ClientSettings.model_construct(folder=folder, address=address, client=None, device="cpu", tags=())
        runner = InlineRunner(Mortal(executor, address, self.fate))
        self.agents[address] = Agent(self.broker, runner, settings)
        self.broker.post(self.agents[address].start)

    def restart_agent(self, address: str) -> None:
        """Take a client's memory away, and start another on its folder."""
        agent = self.agents[address]
        for running in (agent._inbox, agent._registration._timer):
            if running is not None:
                running.cancel()
        for assignment in agent._task_runs.values():
            assignment.stop()
        self.start_agent(address, new_executor())

    def beat(self) -> None:
        """Half a second later; real clients renew their leases themselves."""
        self.now += 0.5

    def play(self, moment: Moment | None = None) -> Report:
        """Run the job to its end; whoever dies on the way is started again."""
        fuse = LateFuse(moment) if moment else Fuse()
        service = self.serve(fuse)
        if isinstance(fuse, LateFuse):
            hear: Callable[[AnyEvent], None] = fuse.hear
            service.listen(lambda _, event: hear(event))
        for number in range(1, self.spec.clients + 1):
            self.start_agent(f"host-{number}", self.executor)
        job = service.submit(self.spec)
        while True:
            try:
                self.run_to_end(job)
                return self.report(job)
            except Died:
                self.deaths += 1
                if self.fate is not None:
                    self.restart_agent(self.fate.address)
                else:
                    self.kill()
                    self.serve()


def new_executor() -> Executor:
    """What a client process trains with; nothing of an earlier one is in it."""
    return Executor(threads=1, device=torch.device("cpu").type)
