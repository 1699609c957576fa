"""The CNN zoo against the parameter counts of its table."""

from __future__ import annotations

import pytest
import torch

from lorabbit.errors import BadInput
from lorabbit_client.models.cnn import Cnn


@pytest.mark.parametrize(
    ("name", "ten", "hundred"),
    [
        ("1", 2_621_558, 2_666_648),
        ("2", 1_815_142, 1_860_232),
        ("3", 1_320_558, 1_365_648),
        ("4", 1_060_358, 1_105_448),
        ("5", 670_058, 715_148),
    ],
)
def test_J12_parameter_counts_are_those_of_the_table(name: str, ten: int, hundred: int):
    counts = [sum(p.numel() for p in Cnn(name, classes).parameters()) for classes in (10, 100)]

    assert counts == [ten, hundred]


def test_an_unknown_cnn_is_bad_input():
    with pytest.raises(BadInput, match="no 'cnn:6'"):
        Cnn("6", 10)


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    output = Cnn("5", 4)(torch.zeros(3, 3, 32, 32), labels=torch.tensor([0, 1, 2]))

    expected = -torch.log_softmax(output.logits, -1)[torch.arange(3), torch.tensor([0, 1, 2])].mean()
    assert output.loss.item() == pytest.approx(expected.item())
