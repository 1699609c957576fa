"""Classification of one text, or of two texts together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import Batch, Features, MeanLoss, Scorer, Scores, TokenRows
from lorabbit_client.data.table import IntArray, LabelTable, Table
from lorabbit_client.tasks.base import LearningTask, Records, first_words, max_tokens, pad_id


class TextClassification(LearningTask):
    """One text, one label."""

    name: ClassVar[str] = "text-classification"
    main_metric: ClassVar[str] = "accuracy"
    texts: ClassVar[tuple[str, ...]] = ("text",)
    positive: ClassVar[bool] = False
    """Whether two classes mean no and yes, so that F1 of the second is a usual figure."""
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "content", "review", "document"),
        "label": ("label", "labels", "class", "coarse_label"),
    }

    def parse(self, table: Table, labels: tuple[str, ...], spec: DataSpec) -> Records:
        """Check texts and labels."""
        columns = {role: table.texts(self.column(table, role, spec)) for role in self.texts}
        return Records(columns, LabelTable(labels).codes(table, self.column(table, "label", spec)))

    def encode(self, records: Records, processor: Any, labels: tuple[str, ...], *, spec: DataSpec) -> Features:  # noqa: ANN401
        """Tokenize each text, or both texts together."""
        length = max_tokens(processor, spec)
        texts = [first_words(records.columns[role], length) for role in self.texts]
        encoded = processor(*texts, truncation=True, max_length=length) if len(records) else {}
        return ClassifiedTokens(
            TokenRows(encoded, pad_id(processor)), records.classes, len(labels), positive=self.positive
        )


class TextPairClassification(TextClassification):
    """Two texts, one label: paraphrase, entailment."""

    name: ClassVar[str] = "text-pair-classification"
    texts: ClassVar[tuple[str, ...]] = ("text_a", "text_b")
    positive: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_a": ("text_a", "sentence1", "premise", "question1", "question"),
        "text_b": ("text_b", "sentence2", "hypothesis", "question2", "sentence"),
        "label": ("label", "labels", "class"),
    }


class ClassifiedTokens(Features):
    """Token rows with one class each."""

    def __init__(self, tokens: TokenRows, classes: IntArray, num_classes: int, *, positive: bool) -> None:
        """Keep the rows; `positive` asks for F1 of the second of two classes."""
        self._tokens, self._classes = tokens, classes
        self._num_classes, self._positive = num_classes, positive

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._classes)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row."""
        return self._tokens.ids.lengths

    def batch(self, rows: IntArray) -> Batch:
        """Return tokens and `labels`."""
        import torch  # noqa: PLC0415 - only where a model runs

        return {**self._tokens.batch(rows), "labels": torch.from_numpy(self._classes[rows])}

    def scorer(self) -> Scorer:
        """Return accuracy and F1."""
        return ClassScorer(self._num_classes, positive=self._positive)


class ClassScorer:
    """Accuracy, and F1 of the second of two classes or over all classes alike."""

    def __init__(self, num_classes: int, *, positive: bool) -> None:
        """Take the number of classes, and whether the second of two is the positive class."""
        self._positive = positive and num_classes == 2  # noqa: PLR2004 - no and yes
        self._loss = MeanLoss()
        self._expected: list[IntArray] = []
        self._predicted: list[IntArray] = []

    def add(self, rows: IntArray, batch: Batch, outputs: Mapping[str, Any]) -> None:
        """Take in the most likely class of each row."""
        self._loss.add(outputs, len(rows))
        self._expected.append(batch["labels"].cpu().numpy())
        self._predicted.append(outputs["logits"].argmax(-1).cpu().numpy())

    def result(self) -> Scores:
        """Return accuracy and f1 or macro_f1."""
        from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415 - heavy, and only clients that evaluate

        if not self._loss.units:
            return Scores(0, None)
        expected, predicted = np.concatenate(self._expected), np.concatenate(self._predicted)
        average, name = ("binary", "f1") if self._positive else ("macro", "macro_f1")
        values = {
            "accuracy": float(accuracy_score(expected, predicted)),
            name: float(f1_score(expected, predicted, average=average, zero_division=0.0)),
        }
        return Scores(self._loss.units, self._loss.value, values)
