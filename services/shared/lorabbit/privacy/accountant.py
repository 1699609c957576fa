"""The accountant: what has been spent, by Renyi differential privacy, from the library dp-accounting."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from lorabbit.errors import BadInput

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Of the Renyi divergence; whole ones, for which the sampled Gaussian has a closed sum."""
GAUSSIAN_ORDERS = (*(1.0 + i / 10 for i in range(1, 10)), *ORDERS)


class SampledGaussian(NamedTuple):
    """Steps of a Gaussian mechanism on secret Poisson samples of the examples."""

    noise: float
    """Standard deviation, in units of the clip."""
    rate: float
    """Probability with which each example is drawn."""
    steps: int


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


def epsilon_of_steps(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon at `delta` of so many steps on a secret Poisson sample of the examples, each drawn with `rate`."""
    return epsilon_of((SampledGaussian(noise, rate, steps),), delta)


@lru_cache(maxsize=4096)
def epsilon_of(spent: tuple[SampledGaussian, ...], delta: float) -> float:
    """Epsilon at `delta` of all of these steps together, each kind with its own noise and rate."""
    if not any(kind.steps for kind in spent):
        return 0.0
    library = _library()
    accountant = library.rdp.RdpAccountant(ORDERS)
    for kind in spent:
        event = library.PoissonSampledDpEvent(min(1.0, kind.rate), library.GaussianDpEvent(kind.noise))
        accountant.compose(event, kind.steps)
    return float(accountant.get_epsilon(delta))
