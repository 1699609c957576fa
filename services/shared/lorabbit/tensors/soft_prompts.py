"""P-tuning's exported prompt, made from the encoder that travels, without a learning framework.

PEFT saves what the encoder makes and drops the encoder. With its MLP of three layers:

    P = W_4 relu(W_2 relu(W_0 E + b_0) + b_2) + b_4        E: one row per virtual token
"""

from __future__ import annotations

import numpy as np

from lorabbit.types import Array, Tensors

EMBEDDINGS = "prompt_embeddings"
"""PEFT's name of a saved prompt."""
ENCODER = "prompt_encoder"
"""First part of the names of p-tuning's encoder, which travels."""
_LAYERS = (0, 2, 4)


def has_encoder(tensors: Tensors) -> bool:
    """Tell whether these are p-tuning's traveling tensors."""
    return f"{ENCODER}.embedding.weight" in tensors


def finished(tensors: Tensors) -> dict[str, Array]:
    """Replace p-tuning's encoder by the prompt that it makes, float32 or the given dtype; other tensors stay."""
    made = tensors[f"{ENCODER}.embedding.weight"]
    rows = np.asarray(made, dtype=np.float64)
    for layer in _LAYERS:
        weight, bias = (
            np.asarray(tensors[f"{ENCODER}.mlp_head.{layer}.{part}"], np.float64) for part in ("weight", "bias")
        )
        rows = rows @ weight.T + bias
        if layer != _LAYERS[-1]:
            rows = np.maximum(rows, 0.0)
    kept = {name: tensors[name] for name in tensors if not name.startswith(f"{ENCODER}.")}
    return {**kept, EMBEDDINGS: rows.astype(made.dtype)}
