"""Which of two versions scored better."""

from __future__ import annotations

from collections.abc import Mapping

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def is_better(metrics: Mapping[str, float], best: Mapping[str, float] | None, *, metric: str | None) -> bool:
    """Compare with the best so far on the main metric, or the loss; no `best`: nothing was scored before."""
    name = metric if metric is not None and metric in metrics else "loss"
    if name not in metrics:
        return best is None
    if best is None or name not in best:
        return True
    sign = -1.0 if name in LOWER_IS_BETTER else 1.0
    return sign * metrics[name] > sign * best[name]
