"""Numbers as people read them: bytes, durations, scores, and sparklines.

One place, so that the live view, the summary and the pages never disagree about a figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def bytes_text(size: float) -> str:
    """Write bytes with a decimal prefix: 999 B, 1.5 kB, 12 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":  # noqa: PLR2004 - where three digits no longer do
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"  # noqa: PLR2004
        size /= 1000
    raise AssertionError("unreachable")


def duration_text(seconds: float) -> str:
    """Write a duration: 0.42 s, 7.3 s, 1:05 min, 2:03:04 h."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:  # noqa: PLR2004 - below a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def score_text(value: float | None) -> str:
    """Write a loss or a metric with what precision means something; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"  # noqa: PLR2004 - perplexities can be large


def fact_text(value: object) -> str:
    """Write a number that a method tells: whole ones as they are, others with four digits; a dash for anything else."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else "-"


def number_text(number: float) -> str:
    """Write a large number with a decimal prefix: 999, 1.5 k, 22.7 M, 4.1 T."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if number < 999.5 or unit == " P":  # noqa: PLR2004 - where three digits no longer do
            return f"{number:.0f}{unit}" if not unit or number >= 99.95 else f"{number:.1f}{unit}"  # noqa: PLR2004
        number /= 1000
    raise AssertionError("unreachable")


def sparkline(values: Sequence[float], *, width: int = 40) -> str:
    """Draw values as block characters, the lowest as the lowest block; the last `width` of them."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = high - low
    if span == 0:
        return BARS[len(BARS) // 2] * len(shown)
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))] for value in shown)


def count_text(number: int, noun: str) -> str:
    """Write a number with its noun: 1 client, 1,000 clients."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
