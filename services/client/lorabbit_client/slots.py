"""Slots: query and value layers of a classifier's last attention blocks, under names that models of any depth share.

"0.query" is the query layer of the lowest of the chosen blocks, whatever its number in the model and whatever its
own name. A pair of factors in a slot adds B A x to what the layer there answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorabbit.errors import BadInput

ROLES = {
    "query": ("query", "q_proj", "q_lin", "query_proj"),
    "value": ("value", "v_proj", "v_lin", "value_proj"),
}
"""Role -> what layers of that role are called in the models of transformers."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r x d_in) and B (d_out x r)."""


def slots_of(model: nn.Module, name: str, count: int) -> dict[str, nn.Linear]:
    """Return the layers in the last `count` blocks by slot; raises BadInput for a model without so many blocks."""
    roles = {own: role for role, names in ROLES.items() for own in names}
    by_block: dict[int, dict[str, nn.Linear]] = {}
    for path, module in model.named_modules():
        role = roles.get(path.rpartition(".")[2])
        block = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if role is not None and block is not None and isinstance(module, nn.Linear):
            by_block.setdefault(block, {})[role] = module
    whole = sorted(block for block, layers in by_block.items() if layers.keys() == ROLES.keys())
    if len(whole) < count:
        raise BadInput(
            f"method.slots: {name!r} has {len(whole)} attention blocks with a query and a value layer of their own, "
            f"not {count}; lower it, or set method.site to 'fc_stack'"
        )
    return {
        f"{slot}.{role}": by_block[block][role]
        for slot, block in enumerate(whole[len(whole) - count :])
        for role in ROLES
    }


@contextmanager
def filled(layers: Mapping[str, nn.Linear], pairs: Mapping[str, Pair]) -> Iterator[None]:
    """Let the layers of these slots add B A x to their answers, until the end of the block."""

    def adds(pair: Pair) -> Any:  # noqa: ANN401 - a hook
        down, up = pair

        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
            return out + (given[0].to(down) @ down.T @ up.T).to(out)

        return hook

    hooks = [layers[slot].register_forward_hook(adds(pair)) for slot, pair in pairs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
