"""Seeds derived from names: every random choice of a job hangs on the job's seed alone.

A seed is a hash of what it is for, so it depends neither on arrival order, nor on the number of
processes, nor on how many random numbers anybody drew before.
"""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, for example ``derive_seed(7, "train", round, k)``."""
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> random.Random:
    """Return a Python generator for one purpose."""
    return random.Random(derive_seed(seed, *purpose))  # noqa: S311 - reproducibility, not secrecy
