"""How hard each training example of a client is, by five measures; a curriculum goes from low to high."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray

from lorabbit.errors import BadInput
from lorabbit.training_session import Difficulty
from lorabbit_client.analysis import fisher
from lorabbit_client.analysis.probe import (
    OnChunk,
    batch_at,
    call,
    chunks,
    evaluation_mode,
    fp32_overrides,
    losses,
    no_progress,
)
from lorabbit_client.dataset import Examples
from lorabbit_client.models.trainable import TrainableModel

SCORED_AT_ONCE = 64


def difficulties(
    model: TrainableModel, examples: Examples, kind: Difficulty, *, on_chunk: OnChunk = no_progress
) -> NDArray[np.float64]:
    """Return the difficulty of every example, float64 (num_examples,); BadInput for a measure that the data lack.

    fisher: squared norm of the gradient of log p(y|x) over the LoRA factors; loss: -log p(y|x), a mean
    over target tokens; length: tokens; rarity: sum of -log(share) of a text's tokens in these data, as Platanios et
    al. (2019) have it for words; rarity-mean: their mean. An example of several rows has the mean of theirs.
    """
    if kind == "fisher":
        return _by_example(examples, fisher.traces(model, examples, range(len(examples)), on_chunk=on_chunk))
    if kind == "loss":
        return _by_example(examples, _losses(model, examples, on_chunk))
    if kind == "length":
        return _by_example(examples, examples.lengths.astype(np.float64))
    fold = sum if kind == "rarity" else np.mean
    return _by_example(examples, np.array([fold(text) if text else 0.0 for text in _rarities(examples)]))


def classes(examples: Examples) -> NDArray[np.int64]:
    """Return the class of every example, int64 (num_examples,); zeros where examples have none."""
    found = np.zeros(len(examples), dtype=np.int64)
    for places in chunks(examples, range(len(examples)), SCORED_AT_ONCE):
        labels = examples.batch(places).get("labels")
        if labels is None or labels.ndim != 1:
            return np.zeros(examples.num_examples, dtype=np.int64)
        found[places] = labels.numpy()
    return found


def _by_example(examples: Examples, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over the rows of each example; a long text may have several."""
    if len(examples) == examples.num_examples:
        return rows
    owners = examples.features.examples_of(examples.rows)
    number = np.concatenate([[0], np.cumsum(owners[1:] != owners[:-1])])
    return np.bincount(number, weights=rows) / np.bincount(number)


def _losses(model: TrainableModel, examples: Examples, on_chunk: OnChunk) -> NDArray[np.float64]:
    found = np.zeros(len(examples), dtype=np.float64)
    with evaluation_mode(model), torch.inference_mode():
        overrides = fp32_overrides(model)
        for places in chunks(examples, range(len(examples)), SCORED_AT_ONCE, on_chunk=on_chunk):
            batch = batch_at(model, examples, places)
            found[places] = losses(call(model, overrides, batch), batch).double().cpu().numpy()
    return found


def _rarities(examples: Examples) -> list[list[float]]:
    """Return -log(count / all) of each text's tokens."""
    texts: list[NDArray[np.int64]] = []
    for position in range(len(examples)):
        batch = examples.batch(np.array([position]))
        if "input_ids" not in batch:
            raise BadInput("method.difficulty: rarity counts words, and these data are no texts; take loss or fisher")
        texts.append(batch["input_ids"][0].numpy()[batch["attention_mask"][0].numpy() == 1])
    counts = Counter(int(token) for text in texts for token in text)
    everything = sum(counts.values())
    rarity = {token: -np.log(count / everything) for token, count in counts.items()}
    return [[rarity[int(token)] for token in text] for text in texts]
