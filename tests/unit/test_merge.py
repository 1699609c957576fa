"""Folding an adapter into its base model, against transformers itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.tensors import serialization
from lorabbit_cli.local.export import export
from lorabbit_client.dataset import load_labels
from lorabbit_client.models.loading import load_model
from lorabbit_client.models.source import resolve
from lorabbit_client.models.trainable import TrainableModel, make_trainable
from lorabbit_client.training.session import read_tensors, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def job(trainable: str) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "sample", "seed": 5, "model": {"name": "tiny:bert", "trainable": trainable, "lora": {"rank": 4}}}
    )


def tuned(spec: JobSpec) -> TrainableModel:
    """A model whose trained tensors are far from where they began."""
    model = make_trainable(spec, load_model(spec, resolve(spec.model.name), load_labels(spec)), torch.device("cpu"))
    drawn = np.random.default_rng(1)
    moved = {
        name: (value + drawn.normal(0, 0.1, value.shape)).astype(value.dtype)
        for name, value in read_tensors(model).items()
    }
    write_tensors(model, moved)
    return model


def run_folder(folder: Path, spec: JobSpec, model: TrainableModel) -> Path:
    (folder / "run" / "adapter").mkdir(parents=True)
    serialization.write_tensors(folder / "run" / "adapter" / "adapter_model.safetensors", read_tensors(model))
    (folder / "run" / "job.yaml").write_text(spec.model_dump_json(), encoding="utf-8")
    return folder / "run"


@pytest.mark.parametrize("trainable", ["lora", "full", "bitfit", "head"])
def test_a_merged_model_answers_like_the_base_with_its_adapter(tmp_path: Path, trainable: str):
    spec = job(trainable)
    model = tuned(spec)
    model.model.eval()

    out = export(run_folder(tmp_path, spec, model), tmp_path / "merged", merged=True)

    merged = AutoModelForSequenceClassification.from_pretrained(out)
    batch = AutoTokenizer.from_pretrained(out)(["open a socket", "add two numbers"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, given = model.model(**batch).logits, merged(**batch).logits
    assert torch.allclose(given, expected, atol=1e-5)
    assert [merged.config.id2label[i] for i in range(len(load_labels(spec)))] == list(load_labels(spec))


def test_bottlenecks_cannot_be_merged_and_nothing_is_left_behind(tmp_path: Path):
    spec = job("adapter")
    folder = run_folder(tmp_path, spec, tuned(spec))

    with pytest.raises(BadInput, match="bottleneck adapters are modules of their own and cannot be merged"):
        export(folder, tmp_path / "merged", merged=True)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
