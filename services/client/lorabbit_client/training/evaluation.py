"""Evaluate a model on held-out rows, longest first.

Rows of similar length share a batch. The largest batch comes first, so a lack of memory shows at once.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from lorabbit.errors import LoRAbbitError
from lorabbit.protocol.messages import Metrics
from lorabbit_client.dataset import Examples
from lorabbit_client.execution.interface import OnProgress
from lorabbit_client.models.trainable import TrainableModel

PROGRESS_SECONDS = 0.25


def evaluate(model: TrainableModel, examples: Examples, batch_size: int, *, on_progress: OnProgress) -> Metrics:
    """Return loss and metrics of the model's present tensors; no rows give no loss and no values.

    `num_examples` is the weight with which clients are pooled (target tokens of a language model).
    """
    device = next(model.model.parameters()).device
    order = np.argsort(-examples.lengths, kind="stable")
    scorer = examples.scorer()
    next_report = time.monotonic() + PROGRESS_SECONDS
    model.model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            batch = examples.batch(positions)
            if device.type != "cpu":
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            scorer.add(examples.rows[positions], batch, model.model(**batch))
            if time.monotonic() >= next_report:
                on_progress(min(1.0, (start + len(positions)) / len(order)), None)
                next_report = time.monotonic() + PROGRESS_SECONDS
    scores = scorer.result()
    if scores.loss is not None and not math.isfinite(scores.loss):
        raise LoRAbbitError(f"the held-out loss is {scores.loss}: the adapter has diverged; lower local.learning_rate")
    values = {name: float(value) for name, value in scores.values.items() if math.isfinite(value)}
    return Metrics(num_examples=scores.num_examples, loss=scores.loss, values=values)
