"""How much each block's output changes when noise is added to the embeddings.

    x' = emb(x) + delta,  ||delta|| = noise * ||emb(x)||
    I^l = mean over examples and draws of ||h_l(x') - h_l(x)|| / (||h_l(x)|| + 1e-12)

h_l is the output of block l at true tokens. Random noise of an example is drawn for its true length from
a generator seeded by (seed, example, draw), so neither padding nor batching changes it. Adversarial noise
is the gradient of the example's own loss with respect to emb(x), brought to that norm, and needs no draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorabbit.errors import BadInput
from lorabbit.runtime.seeds import derive_seed
from lorabbit.training_session import Direction, Sensitivity
from lorabbit_client.analysis.probe import (
    CHUNK,
    OnChunk,
    batch_at,
    call,
    chunks,
    evaluation_mode,
    fp32_overrides,
    losses,
    no_progress,
)
from lorabbit_client.data.features import Batch
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.models.trainable import TrainableModel

TINY = 1e-12


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How layers are probed."""

    noise: float
    """Norm of what is added, as a share of the embeddings' norm."""
    draws: int
    probes: int
    """Examples that are probed, at most."""
    variant: Sensitivity
    """relative: over the norm of the output; abs: not; gain: over the change of the block before."""
    seed: int
    direction: Direction = "random"
    """Of the noise: any, or the one in which the loss grows fastest."""


def sensitivities(
    model: TrainableModel, examples: Examples, probe: ProbeSettings, *, on_chunk: OnChunk = no_progress
) -> NDArray[np.float64]:
    """Return how sensitive each block is, float64 (blocks,); raises BadInput for a model without blocks."""
    chosen = np.random.default_rng(derive_seed(probe.seed, "probes")).permutation(len(examples))[: probe.probes]
    total: NDArray[np.float64] | None = None
    draws = 1 if probe.direction == "adversarial" else probe.draws
    with evaluation_mode(model):
        overrides = fp32_overrides(model)
        for places in chunks(examples, chosen.tolist(), CHUNK, on_chunk=on_chunk):
            batch = batch_at(model, examples, chosen[places])
            direction = _loss_gradient(model, overrides, batch) if probe.direction == "adversarial" else None
            with torch.inference_mode():
                clean = _states(model, overrides, batch)
                for draw in range(draws):
                    with _noise(model, batch, chosen[places], probe=probe, draw=draw, direction=direction):
                        perturbed = _states(model, overrides, batch)
                    found = _output_changes(clean, perturbed, probe.variant).sum(0)
                    total = found if total is None else total + found
    if total is None:
        raise BadInput("data: a client has no training example, so its layers cannot be probed; lower `clients`")
    return total / (len(chosen) * draws)


def _states(model: TrainableModel, overrides: dict[str, torch.Tensor], batch: Batch) -> list[torch.Tensor]:
    """Return embeddings and every block's output, true tokens alone."""
    if getattr(model.model, "config", None) is None:
        raise BadInput("model.name: this model has no blocks of which one could be more sensitive than another")
    outputs = call(model, overrides, batch, output_hidden_states=True)
    mask = batch.get("attention_mask")
    return [state if mask is None else state * mask.unsqueeze(-1) for state in outputs["hidden_states"]]


def _output_changes(
    clean: list[torch.Tensor], perturbed: list[torch.Tensor], variant: Sensitivity
) -> NDArray[np.float64]:
    """Return the change of every block's output, (examples, blocks)."""
    changes = [_norm(after - before) for before, after in zip(clean, perturbed, strict=True)]
    if variant == "abs":
        found = changes[1:]
    elif variant == "gain":
        found = [later / (earlier + TINY) for earlier, later in pairwise(changes)]
    else:
        found = [change / (_norm(state) + TINY) for change, state in zip(changes[1:], clean[1:], strict=True)]
    stacked: NDArray[np.float64] = torch.stack(found, dim=1).cpu().numpy()
    return stacked


def _norm(states: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norm of each example's states."""
    return states.double().flatten(1).square().sum(1).sqrt()


def _embedding(model: TrainableModel) -> nn.Module:
    base: Any = model.model
    embedding: nn.Module = base.get_input_embeddings()
    return embedding


def _loss_gradient(model: TrainableModel, overrides: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return the gradient of each example's loss with respect to its embeddings, in their shape."""
    captured: list[torch.Tensor] = []

    def capture(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:  # noqa: ANN401, ARG001 - a hook
        captured.append(out.detach().requires_grad_())
        return captured[0]

    hook = _embedding(model).register_forward_hook(capture)
    try:
        with torch.enable_grad():
            total = losses(call(model, overrides, batch), batch).sum()
            return torch.autograd.grad(total, captured[0])[0]
    finally:
        hook.remove()


@contextmanager
def _noise(  # noqa: PLR0913 - what is moved, and how
    model: TrainableModel,
    batch: Batch,
    names: IntArray,
    *,
    probe: ProbeSettings,
    draw: int,
    direction: torch.Tensor | None,
) -> Iterator[None]:
    """Add noise to the output of the embedding layer: in a direction, or at random."""
    mask = batch.get("attention_mask")

    def add_noise(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:  # noqa: ANN401, ARG001 - a hook
        noisy: torch.Tensor = out.clone()
        for row, name in enumerate(names):
            length = out.shape[1] if mask is None else int(mask[row].sum())
            if direction is None:
                generator = torch.Generator().manual_seed(derive_seed(probe.seed, "noise", int(name), draw))
                delta = torch.randn((length, out.shape[-1]), generator=generator).to(out)
            else:
                delta = direction[row, :length].to(out)
            norm = delta.norm()
            if norm > 0:
                noisy[row, :length] += delta * (probe.noise * out[row, :length].norm() / norm)
        return noisy

    hook = _embedding(model).register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
