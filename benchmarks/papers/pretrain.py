"""Make the base model of the image sweep: a small vision transformer that has seen half of the classes of CIFAR-10.

    python benchmarks/papers/pretrain.py [--out runs/bases/cifar10-vit-0-4] [--epochs 8] [--threads 2]

It is trained on the training images of classes 0 to 4 (25,000 of the full archive where that is there, else 4,000),
with flips and shifts, and saved without its head as a folder that transformers loads. No test image is looked at but to
say how good it is. A folder that was made with the same settings from the same data is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

CLASSES, SIDE, SEED = 5, 32, 0
BATCH, LEARNING_RATE, WEIGHT_DECAY, SHIFT = 128, 1e-3, 0.05, 2
SIZE = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 384, "image_size": SIDE,
    "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES,
}  # fmt: skip
Pixels = NDArray[np.uint8]


def main() -> None:
    """Read the options, and make the base unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bases/cifar10-vit-0-4"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if "LORABBIT_DATA" not in os.environ:
        parser.error("set LORABBIT_DATA to the folder that holds cifar10/")
    folder = Path(os.environ["LORABBIT_DATA"]) / "cifar10"
    archive = next((a for a in (folder / "cifar10_full_jpeg.npz", folder / "cifar10.npz") if a.is_file()), None)
    if archive is None:
        parser.error(f"{folder} has neither cifar10_full_jpeg.npz nor cifar10.npz")
    made_of = _made_of(archive, options.epochs)
    note = options.out / "made-of.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_of:
        print(f"{options.out} is there already")
        return
    torch.set_num_threads(options.threads)
    model = train(*_half(archive, "train"), epochs=options.epochs)
    print(f"accuracy on the test images of its classes: {accuracy(model, *_half(archive, 'test')):.4f}")
    _save(model, options.out, made_of)


def _made_of(archive: Path, epochs: int) -> dict[str, object]:
    """Everything that the base depends on."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {"batch": BATCH, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "shift": SHIFT}
    return {"data": digest, "epochs": epochs, "seed": SEED, "size": SIZE, **settings}


def _half(archive: Path, split: str) -> tuple[Pixels, NDArray[np.int64]]:
    """Read the images and labels of classes 0 to 4; images are N x 32 x 32 x 3."""
    with np.load(archive) as arrays:
        labels = arrays[f"y_{split}"].astype(np.int64)
        wanted = np.flatnonzero(labels < CLASSES)
        if f"x_{split}" in arrays:
            return arrays[f"x_{split}"][wanted], labels[wanted]
        whole, ends = arrays[f"jpeg_{split}"], arrays[f"offsets_{split}"]
    images = [np.asarray(Image.open(io.BytesIO(whole[ends[i] : ends[i + 1]].tobytes())).convert("RGB")) for i in wanted]
    return np.stack(images), labels[wanted]


def train(pixels: Pixels, labels: NDArray[np.int64], *, epochs: int) -> ViTForImageClassification:
    """Train from nothing, the learning rate rising for a tenth of the steps and falling as a cosine."""
    torch.manual_seed(SEED)
    model = ViTForImageClassification(ViTConfig(**SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    images, targets = _tensor(pixels), torch.from_numpy(labels)
    for epoch in range(1, epochs + 1):
        began, total = time.perf_counter(), 0.0
        order = torch.randperm(len(targets))[: len(targets) // BATCH * BATCH].view(-1, BATCH)
        model.train()
        for rows in order:
            loss = functional.cross_entropy(model(_perturbed(images[rows])).logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}/{epochs}: loss {total / len(order):.4f}, {time.perf_counter() - began:.1f} s", flush=True)
    return model


def _tensor(pixels: Pixels) -> torch.Tensor:
    """Channels first, -1 to 1, as the image processor does it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _perturbed(images: torch.Tensor) -> torch.Tensor:
    """Flip half of the images, and shift the batch by up to `SHIFT` pixels each way."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)  # noqa: PLR2004 - half of them
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    return torch.roll(flipped, (down, right), (2, 3))


def accuracy(model: ViTForImageClassification, pixels: Pixels, labels: NDArray[np.int64]) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(batch).logits.argmax(-1) for batch in _tensor(pixels).split(500)])
    return float((found == torch.from_numpy(labels)).float().mean())


def _save(model: ViTForImageClassification, out: Path, made_of: dict[str, object]) -> None:
    """Write the body, the image processor and what they are made of, in place of an older base."""
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    model.vit.save_pretrained(new)
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    side = {"height": SIDE, "width": SIDE}
    processor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(new)
    (new / "made-of.json").write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    print(f"wrote {out} ({sum(p.numel() for p in model.vit.parameters()):,} parameters)")


if __name__ == "__main__":
    main()
