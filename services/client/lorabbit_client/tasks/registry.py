"""The learning tasks by the names that a job's `model.task` uses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorabbit_client.tasks.base import LearningTask
from lorabbit_client.tasks.causal_lm import CausalLanguageModeling
from lorabbit_client.tasks.image_classification import ImageClassification
from lorabbit_client.tasks.question_answering import QuestionAnswering
from lorabbit_client.tasks.text_classification import TextClassification, TextPairClassification
from lorabbit_client.tasks.token_classification import TokenClassification

_ALL: tuple[LearningTask, ...] = (
    TextClassification(),
    TextPairClassification(),
    TokenClassification(),
    QuestionAnswering(),
    CausalLanguageModeling(),
    ImageClassification(),
)
TASKS: Mapping[str, LearningTask] = MappingProxyType({task.name: task for task in _ALL})
