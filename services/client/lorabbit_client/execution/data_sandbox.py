"""A client that serves others' jobs reads data below its own data root, and nowhere else.

Who submits a job to a server names its data source, and the client's machine is somebody else's.
Links below the root are its operator's own and are followed. `lorabbit run` is not confined: there
whoever names the data owns the machine.
"""

from __future__ import annotations

from pathlib import Path

from lorabbit.errors import BadInput
from lorabbit.protocol.messages import Metrics
from lorabbit_client.execution.interface import OnProgress, TaskInput, TaskResult
from lorabbit_client.execution.runners import TaskExecutor


def check_source(source: str, data_root: Path) -> None:
    """Refuse a `data.source` that names a file outside of `data_root`; raises BadInput."""
    path = Path(source)
    roots = (data_root.absolute(), data_root.resolve())
    outside = path.is_absolute() and not any(path.is_relative_to(root) for root in roots)
    if outside or ".." in path.parts or source.startswith("~"):
        raise BadInput(
            f"data.source: {source!r} is outside of this client's data folder {data_root.resolve()}; "
            "name a path below it, or have the client's operator set LORABBIT_DATA_ROOT"
        )


class SandboxedExecutor:
    """Executes tasks whose data lies below the data root; the others fail as bad input."""

    def __init__(self, executor: TaskExecutor, data_root: Path) -> None:
        """Confine this executor."""
        self._executor, self._data_root = executor, data_root

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        """Do one task, or say why its data is refused; raises nothing but Cancelled."""
        try:
            check_source(work.task.spec.data.source, self._data_root)
        except BadInput as error:
            return TaskResult(Metrics(num_examples=0), has_tensors=False, error=str(error), bad_input=True)
        return self._executor.execute(work, on_progress)
