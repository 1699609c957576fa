"""Directions of metrics: whether a higher or a lower value of a metric is better."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
"""Of every other metric a higher value is better."""


def lower_is_better(metric: str) -> bool:
    """Tell whether a lower value of a metric is better."""
    return metric in LOWER_IS_BETTER


def is_better(metric: str, value: float, than: float) -> bool:
    """Compare two values of one metric; equal values are not better."""
    return value < than if lower_is_better(metric) else value > than
