"""The learning tasks by the names that a job's `model.task` uses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorabbit_client.tasks.base import LearningTask
from lorabbit_client.tasks.text import TextClassification, TextPairClassification

TASKS: Mapping[str, LearningTask] = MappingProxyType(
    {task.name: task for task in (TextClassification(), TextPairClassification())}
)
