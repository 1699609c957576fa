"""Robust aggregation: what a few hostile clients can do to a round is bounded, whatever the method.

`defend` stands between admission and a method's `aggregate`; `check` refuses jobs for which it would mean
nothing. See docs/explanation/robustness.md.
"""

from lorabbit.robust.choice import check
from lorabbit.robust.defence import defend

__all__ = ["check", "defend"]
