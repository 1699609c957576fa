"""A metric defines which of two values is better."""

from __future__ import annotations

import pytest

from lorabbit.metrics import is_better, lower_is_better


@pytest.mark.parametrize(("metric", "better", "worse"), [("accuracy", 0.9, 0.8), ("loss", 0.1, 0.2), ("f1", 1, 0)])
def test_the_better_of_two_values_follows_the_metrics_direction(metric, better, worse):
    assert is_better(metric, better, worse)
    assert not is_better(metric, worse, better)
    assert not is_better(metric, better, better)


def test_perplexity_and_loss_are_the_metrics_to_minimize():
    assert [name for name in ("accuracy", "f1", "loss", "perplexity") if lower_is_better(name)] == [
        "loss",
        "perplexity",
    ]
