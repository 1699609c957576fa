"""Image classification: gray or color images of any size, brought to the model's size and range.

Images stay as they came, one byte a value; a batch is resized (bilinear, antialiased) and
normalized when it is made, which costs little and keeps a large data set small in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import Batch, Features, Scorer
from lorabbit_client.data.table import Column, IntArray, LabelTable, Table
from lorabbit_client.tasks.base import LearningTask, Records
from lorabbit_client.tasks.text_classification import ClassScorer

GRAY, COLOR = 1, 3


@dataclass(frozen=True)
class ImageFormat:
    """What a model wants of an image; read from any Hugging Face image processor by `of`."""

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel, of values in 0..1; their number is the number of channels."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, processor: Any) -> ImageFormat:  # noqa: ANN401 - an image processor
        """Return the format of an image processor; an ImageFormat is its own."""
        if isinstance(processor, cls):
            return processor
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        side = size.get("shortest_edge", 0)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        if not getattr(processor, "do_normalize", True):
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        return cls(size.get("height", side), size.get("width", side), mean, std)


class ImageClassification(LearningTask):
    """One image, one label."""

    name: ClassVar[str] = "image-classification"
    main_metric: ClassVar[str] = "accuracy"
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("image", "img", "pixels", "x"),
        "label": ("label", "labels", "fine_label", "y"),
    }

    def parse(self, table: Table, labels: tuple[str, ...], spec: DataSpec) -> Records:
        """Check that every row has an image and a known label."""
        column = self.column(table, "image", spec)
        values = table.columns[column]
        if not isinstance(values, np.ndarray):
            values = [_pixels(table, column, row) for row in range(len(table))]
        elif values.dtype != np.uint8 or values.ndim not in {3, 4}:
            raise BadInput(
                f"{table.name}: images are {values.dtype}{values.shape}, expected uint8 (rows, height, width[, 3])"
            )
        return Records({"image": values}, LabelTable(labels).codes(table, self.column(table, "label", spec)))

    def encode(self, records: Records, processor: Any, labels: tuple[str, ...], *, spec: DataSpec) -> Features:  # noqa: ANN401, ARG002
        """Keep the images as bytes, with their target format."""
        return Images(records.columns["image"], records.classes, len(labels), image_format=ImageFormat.of(processor))


def _pixels(table: Table, column: str, row: int) -> NDArray[np.uint8]:
    """Return one image as bytes: an array, nested lists, or a Pillow image as the hub gives them."""
    value = table.value(column, row)
    if hasattr(value, "convert"):
        value = value if value.mode == "L" else value.convert("RGB")
    try:
        pixels = np.asarray(value, dtype=np.uint8)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"{table.place(row)}: field {column!r} is no image: {error}") from error
    if pixels.ndim not in {2, 3}:
        raise BadInput(f"{table.place(row)}: field {column!r} has {pixels.ndim} dimensions, expected 2 or 3")
    return pixels


class Images(Features):
    """Images with one class each."""

    def __init__(self, images: Column, classes: IntArray, num_classes: int, *, image_format: ImageFormat) -> None:
        """Keep the images; those of unlike sizes are brought to the format's size now."""
        self._classes, self._num_classes, self._image_format = classes, num_classes, image_format
        alike = isinstance(images, np.ndarray) or len({image.shape for image in images}) <= 1
        self._pixels = np.asarray(images) if alike else np.stack([_resized(image, image_format) for image in images])

    def __len__(self) -> int:
        """Count the images."""
        return len(self._classes)

    @property
    def lengths(self) -> IntArray:
        """One each: all images cost the same."""
        return np.ones(len(self), dtype=np.int64)

    def batch(self, rows: IntArray) -> Batch:
        """Return `pixel_values` float32 (rows, channels, height, width) and `labels`."""
        import torch  # noqa: PLC0415 - only where a model runs
        from torch.nn.functional import interpolate  # noqa: PLC0415

        image_format = self._image_format
        pixels = torch.from_numpy(self._pixels[rows]).to(torch.float32) / 255.0
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.movedim(-1, 1)  # noqa: PLR2004 - gray
        if pixels.shape[1] != len(image_format.mean):
            pixels = pixels[:, :COLOR].mean(dim=1, keepdim=True)
            pixels = pixels.expand(-1, len(image_format.mean), -1, -1)
        if pixels.shape[2:] != (image_format.height, image_format.width):
            pixels = interpolate(pixels, (image_format.height, image_format.width), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (image_format.mean, image_format.std))
        return {"pixel_values": (pixels - mean) / std, "labels": torch.from_numpy(self._classes[rows])}

    def scorer(self) -> Scorer:
        """Return accuracy and macro F1."""
        return ClassScorer(self._num_classes, positive=False)


def _resized(image: NDArray[np.uint8], image_format: ImageFormat) -> NDArray[np.uint8]:
    """Bring one image to the format's size, in color."""
    from PIL import Image  # noqa: PLC0415 - only for images of unlike sizes

    picture = Image.fromarray(image).convert("RGB")
    return np.asarray(picture.resize((image_format.width, image_format.height), Image.Resampling.BILINEAR))
