"""Restricts the data of a client to files below its data root.

A job names its data source, but the client's machine belongs to another operator. Symbolic links below the root are set
by that operator and are followed. `lorabbit run` has no restriction, since its user owns the machine.
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
    """Executes tasks whose data is below the data root; other tasks fail as bad input."""

    def __init__(self, executor: TaskExecutor, data_root: Path) -> None:
        """Restrict this executor to `data_root`."""
        self._executor, self._data_root = executor, data_root

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        """Execute one task, or fail it if its data is refused; raises nothing but Cancelled."""
        try:
            check_source(work.task.spec.data.source, self._data_root)
        except BadInput as error:
            return TaskResult(Metrics(num_examples=0), has_tensors=False, error=str(error), bad_input=True)
        return self._executor.execute(work, on_progress)
