"""The accountant: what has been spent, by Renyi differential privacy, from the library dp-accounting."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lorabbit.errors import BadInput

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Of the Renyi divergence; whole ones, for which the sampled Gaussian has a closed sum."""
GAUSSIAN_ORDERS = (*(1.0 + i / 10 for i in range(1, 10)), *ORDERS)


def _library() -> Any:  # noqa: ANN401 - untyped, and imported where a job asks for it only
    try:
        import dp_accounting  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(
            "privacy: the accountant is not installed here; run `pip install 'lorabbit[privacy]'`, or leave privacy out"
        ) from error
    return dp_accounting


@lru_cache(maxsize=4096)
def epsilon_of_rounds(noise: float, rounds: int, delta: float) -> float:
    """Epsilon at `delta` of so many releases of a Gaussian mechanism, nothing hidden by sampling."""
    if rounds == 0:
        return 0.0
    library = _library()
    accountant = library.rdp.RdpAccountant(GAUSSIAN_ORDERS)
    accountant.compose(library.GaussianDpEvent(noise), rounds)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def epsilon_of_steps(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon at `delta` of so many steps on a secret Poisson sample of the examples, each drawn with `rate`."""
    if steps == 0:
        return 0.0
    library = _library()
    accountant = library.rdp.RdpAccountant(ORDERS)
    event = library.PoissonSampledDpEvent(min(1.0, rate), library.GaussianDpEvent(noise))
    accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))
