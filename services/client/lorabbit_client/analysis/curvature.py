"""The share of a client's curvature that must not be lost, by two rules; see docs/methods/fibecfed.md.

slq: stochastic Lanczos quadrature of the Hessian's spectrum, and the share of it above a threshold
that is raised until the share is stable; a port of the public code of FedPepTAO
(github.com/llm-eff/FedPepTAO, `get_ratio.py`). eigengap: the first gap of the ascending spectrum that
exceeds four Lipschitz constants (FedDUAP), on the empirical Fisher information, because an indefinite
Hessian always has its first gap at its most negative end. Second derivatives do not pass through fused
attention, so the model computes with `eager` attention meanwhile. All in float32 or more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lorabbit.runtime.seeds import derive_seed
from lorabbit_client.analysis import fisher
from lorabbit_client.analysis.probe import batch_at, call, evaluation_mode, fp32_overrides, losses, parameter_names
from lorabbit_client.dataset import Examples
from lorabbit_client.models.trainable import TrainableModel

Vector = NDArray[np.float64]
Product = Callable[[Vector], Vector]
"""v -> H v."""
STEPS, BINS, SMOOTHING, MARGIN = 50, 10_000, 1e-5, 0.01
INCREMENT, STABLE_CHANGE, HALVINGS = 0.1, 0.005, 40
RADIUS, DIRECTIONS = 0.01, 3


# ---- spectra ----
@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """Nodes of a spectral density and their weights, which sum to one."""

    nodes: Vector
    weights: Vector


def lanczos(product: Product, size: int, *, steps: int = STEPS, seed: int = 0) -> SpectralDensity:
    """Return the quadrature of a symmetric operator's spectrum from one Rademacher probe, fully reorthogonalized."""
    probe = np.random.default_rng(seed).integers(0, 2, size) * 2.0 - 1.0
    basis = [probe / np.linalg.norm(probe)]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, size)):
        result = product(basis[-1])
        diagonal.append(float(basis[-1] @ result))
        for _ in range(2):
            for known in basis:
                result = result - (known @ result) * known
        length = float(np.linalg.norm(result))
        if length < 1e-8 * max(1e-30, *(abs(value) for value in diagonal)):
            break
        off_diagonal.append(length)
        basis.append(result / length)
    rank = len(diagonal)
    off = np.array(off_diagonal[: rank - 1])
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return SpectralDensity(nodes, vectors[0] ** 2)


def share_above(spectrum: SpectralDensity) -> Callable[[float], float]:
    """Return t -> the smoothed spectral mass above t (Gaussians on a grid, as PyHessian has it)."""
    low, high = float(spectrum.nodes.min()) - MARGIN, float(spectrum.nodes.max()) + MARGIN
    grid = np.linspace(low, high, BINS)
    variance = SMOOTHING * max(1.0, high - low)
    density = np.zeros(BINS)
    for node, weight in zip(spectrum.nodes, spectrum.weights, strict=True):
        density += weight * np.exp(-((grid - node) ** 2) / (2.0 * variance))
    below = np.cumsum(density) / density.sum()

    def above(threshold: float) -> float:
        if threshold < low:
            return 1.0
        return float(1.0 - below[min(BINS - 1, int(np.searchsorted(grid, threshold, side="right")) - 1)])

    return above


def stable_share(above: Callable[[float], float]) -> float:
    """Raise a threshold from 0 until the share above it is stable; within [R0 / 2, R0], R0 the share above 0.

    The share is stable after three changes in a row below 0.005. If it falls below R0 / 2, restart with half the step.
    """
    first, step = above(0.0), INCREMENT
    for _ in range(HALVINGS):
        shares = [first]
        while shares[-1] >= first / 2:
            if len(shares) > 3 and all(abs(shares[i] - shares[i - 1]) < STABLE_CHANGE for i in (-1, -2, -3)):  # noqa: PLR2004
                return shares[-1]
            shares.append(above(step * len(shares)))
        step /= 2
    return first


def gap_share(ascending: Vector, lipschitz: float) -> float:
    """Return 1 - m / d for the first m with lambda_{m+1} - lambda_m > 4 L; 1 when there is no such gap."""
    wide = np.flatnonzero(np.diff(ascending) > 4.0 * lipschitz)
    return 1.0 if not len(wide) else 1.0 - (int(wide[0]) + 1) / len(ascending)


# ---- a model's curvature over its LoRA factors ----
def lossless_share(
    model: TrainableModel, examples: Examples, positions: Sequence[int], *, rule: Literal["slq", "eigengap"], seed: int
) -> float:
    """Return the share of curvature directions that must not be lost, in (0, 1], from a few examples."""
    rows = np.asarray(positions, dtype=np.int64)
    with evaluation_mode(model, attention="eager"), torch.enable_grad():
        surface = LossSurface(model, examples, rows)
        if rule == "slq":
            spectrum = lanczos(surface.product, surface.size, seed=derive_seed(seed, "lanczos"))
            share = stable_share(share_above(spectrum))
        else:
            share = gap_share(_fisher_eigenvalues(model, examples, rows), surface.lipschitz(derive_seed(seed, "gap")))
    return min(1.0, max(share, 1.0 / max(1, surface.size)))


class LossSurface:
    """A client's mean loss as a function of all LoRA factors in one vector, at the present point."""

    def __init__(self, model: TrainableModel, examples: Examples, rows: NDArray[np.int64]) -> None:
        """Build the graph of the gradient once; the factors themselves are not touched."""
        self._model, self._batch = model, batch_at(model, examples, rows)
        self._fixed = fp32_overrides(model)
        state = dict(model.model.named_parameters())
        own = parameter_names(model).values()
        self._point = {name: self._fixed.get(name, state[name]).detach().clone().requires_grad_() for name in own}
        self.size = sum(value.numel() for value in self._point.values())
        self._gradient = self._differentiate(self._point, twice=True)

    def _differentiate(self, point: dict[str, torch.Tensor], *, twice: bool = False) -> torch.Tensor:
        loss = losses(call(self._model, {**self._fixed, **point}, self._batch), self._batch).mean()
        gradients = torch.autograd.grad(loss, list(point.values()), create_graph=twice)
        return torch.cat([gradient.reshape(-1) for gradient in gradients])

    def product(self, vector: Vector) -> Vector:
        """Return the Hessian times a vector."""
        vector_tensor = torch.from_numpy(vector).to(self._gradient)
        gradients = torch.autograd.grad(self._gradient, list(self._point.values()), vector_tensor, retain_graph=True)
        result: Vector = torch.cat([gradient.reshape(-1) for gradient in gradients]).double().cpu().numpy()
        return result

    def lipschitz(self, seed: int) -> float:
        """Return the largest ||H D - (g(P + D) - g(P))|| / ||D|| over a few random D of norm 0.01 ||P||."""
        radius = RADIUS * float(torch.sqrt(sum((v.detach() ** 2).sum() for v in self._point.values())))  # type: ignore[arg-type]
        draw = np.random.default_rng(seed)
        here = self._gradient.detach().double().cpu().numpy()
        found = 0.0
        for _ in range(DIRECTIONS):
            step = draw.standard_normal(self.size)
            step *= max(radius, 1e-6) / np.linalg.norm(step)
            there = self._differentiate(self._shifted_point(step)).detach().double().cpu().numpy()
            found = max(found, float(np.linalg.norm(self.product(step) - (there - here)) / np.linalg.norm(step)))
        return found

    def _shifted_point(self, step: Vector) -> dict[str, torch.Tensor]:
        """Return the point moved by a step, with a graph of its own."""
        flat, shifted, start = torch.from_numpy(step), {}, 0
        for name, value in self._point.items():
            part = flat[start : start + value.numel()].reshape(value.shape).to(value)
            shifted[name] = (value.detach() + part).requires_grad_()
            start += value.numel()
        return shifted


def _fisher_eigenvalues(model: TrainableModel, examples: Examples, rows: NDArray[np.int64]) -> Vector:
    """Return the empirical Fisher's eigenvalues but for its zeros, ascending: those of the examples' Gram matrix."""
    flat: Vector = np.zeros((len(rows), 0))
    for places, gradients in fisher.per_example_gradients(model, examples, rows.tolist()):
        part = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).double().cpu().numpy()
        flat = flat if flat.shape[1] else np.zeros((len(rows), part.shape[1]))
        flat[places] = part
    return np.asarray(np.linalg.eigvalsh(flat @ flat.T / len(rows)), dtype=np.float64)
