"""Counted operations, against torch's own counter and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from lorabbit_client.training.flop_counter import FlopCounter

CLASSES, ROWS, WORDS = 3, 2, 7


def counted(step: Any) -> tuple[float, int]:
    """What is counted here, and by torch, which watches the backward pass too."""
    with FlopCounter() as ours:
        step()
    with FlopCounterMode(display=False) as theirs:
        step()
    return ours.flops, theirs.get_total_flops()


def bert(attention: str = "eager") -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=11, num_labels=CLASSES, attn_implementation=attention, **sizes)
    return BertForSequenceClassification(config)


def step_of(model: nn.Module) -> Any:
    batch = {"input_ids": torch.arange(ROWS * WORDS).view(ROWS, WORDS) % 11, "labels": torch.tensor([0, 1])}

    def step() -> None:
        model(**batch).loss.backward()

    return step


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("moving", ["everything", "the head", "the last layer", "biases"])
def test_a_transformers_step_counts_what_torch_counts_whatever_moves(moving: str, attention: str) -> None:
    model = bert(attention)
    for name, value in model.named_parameters():
        wanted = {"the head": "classifier", "the last layer": "layer.1.", "biases": "bias", "everything": ""}[moving]
        value.requires_grad = wanted in name

    ours, theirs = counted(step_of(model))

    assert ours == theirs > 0


def test_convolutions_count_what_torch_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 5)
    )
    images = torch.zeros(ROWS, 3, 8, 8)

    ours, theirs = counted(lambda: model(images).sum().backward())

    assert ours == theirs > 0


def test_a_linear_layer_counts_two_for_each_multiply_add_and_once_more_for_each_operand_that_moves() -> None:
    layer, rows = nn.Linear(5, 3), torch.zeros(4, 5)

    with FlopCounter() as trained:
        layer(rows)
    with FlopCounter() as below, torch.enable_grad():
        layer(rows.clone().requires_grad_())
    with FlopCounter() as looked_at, torch.no_grad():
        layer(rows)

    assert (looked_at.flops, trained.flops, below.flops) == (2 * 4 * 5 * 3, 2 * 2 * 4 * 5 * 3, 3 * 2 * 4 * 5 * 3)


def test_counting_changes_no_bit() -> None:
    model = bert("sdpa").eval()
    step_of(model)()
    plain = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    model.zero_grad()

    with FlopCounter():
        step_of(model)()

    assert all(torch.equal(a, b.grad) for a, b in zip(plain, model.parameters(), strict=True) if b.grad is not None)
