"""The five small CNNs of the pFedLoRA family (arXiv 2310.13283; zoo as in the authors' code).

5x5 convolutions without padding, ReLU, 2x2 max-pooling, three fully connected layers, images of
3x32x32. Parameters for 10 classes: 2,621,558 / 1,815,142 / 1,320,558 / 1,060,358 / 670,058. They
answer like a Hugging Face image classifier, so tasks and trainers need no case of their own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutput

from lorabbit.errors import BadInput

SHAPES = {"1": (16, 32, 2000), "2": (16, 16, 2000), "3": (16, 32, 1000), "4": (16, 32, 800), "5": (16, 32, 500)}
"""Name -> channels of conv1, of conv2, width of fc1."""
IMAGE_SIDE = 32
_FLAT_SIDE = 5


class Cnn(nn.Module):
    """One CNN of the zoo."""

    LAST_WIDTH: ClassVar[int] = 500
    """Width of what the last layer reads, the same in all of them."""

    @staticmethod
    def flat_width(name: str) -> int:
        """Width of what the convolutions of CNN `name` see, flattened: 400 or 800."""
        return SHAPES[name][1] * _FLAT_SIDE * _FLAT_SIDE

    def __init__(self, name: str, classes: int) -> None:
        """Build CNN `name` ("1" to "5"); raises BadInput for another name."""
        super().__init__()
        if name not in SHAPES:
            raise BadInput(f"model.name: there is no 'cnn:{name}' (known: {', '.join(f'cnn:{n}' for n in SHAPES)})")
        first, second, width = SHAPES[name]
        self.conv1 = nn.Conv2d(3, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(self.flat_width(name), width)
        self.fc2 = nn.Linear(width, self.LAST_WIDTH)
        self.fc3 = nn.Linear(self.LAST_WIDTH, classes)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, 32, 32) to what the convolutions see in them, flattened as (C, H, W)."""
        hidden = functional.max_pool2d(functional.relu(self.conv1(pixel_values)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        return torch.flatten(hidden, 1)

    def represent(self, features: torch.Tensor) -> torch.Tensor:
        """Map what the convolutions see to the input of the last layer, (batch, 500)."""
        return functional.relu(self.fc2(functional.relu(self.fc1(features))))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classify images; the loss is the mean cross-entropy where labels are given."""
        logits = self.fc3(self.represent(self.features(pixel_values)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
