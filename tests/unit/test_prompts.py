"""P-tuning's exported prompt is what torch makes of its encoder."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from lorabbit.tensors import serialization, soft_prompts
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_server.artifacts.adapter_export import AdapterExporter
from lorabbit_server.artifacts.fenced_files import FencedFileWriter


def encoder(rows: int = 3, width: int = 5) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random traveling tensors, and the prompt that torch makes of them."""
    torch.manual_seed(4)
    embedding = nn.Embedding(rows, width)
    mlp = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())))[:-1]
    tensors = {f"prompt_encoder.mlp_head.{name}": value.detach().numpy() for name, value in mlp.named_parameters()}
    tensors["prompt_encoder.embedding.weight"] = embedding.weight.detach().numpy()
    return tensors, mlp(embedding.weight).detach().numpy()


def test_the_prompt_is_the_encoders_output_and_other_tensors_stay():
    tensors, expected = encoder()
    head = np.arange(4, dtype=np.float32)

    made = soft_prompts.finished({**tensors, "base_model.classifier.weight": head})

    assert set(made) == {"prompt_embeddings", "base_model.classifier.weight"}
    np.testing.assert_allclose(made["prompt_embeddings"], expected, rtol=1e-5, atol=1e-6)
    assert made["base_model.classifier.weight"] is head


def test_the_prompt_keeps_the_dtype_of_the_wire():
    tensors, _ = encoder()

    made = soft_prompts.finished({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})

    assert made["prompt_embeddings"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("durable", [False, True])
def test_an_exported_folder_holds_the_prompt_instead_of_the_encoder(tmp_path: Path, *, durable: bool):
    tensors, expected = encoder()
    exports = AdapterExporter(PayloadStore(tmp_path / "payloads", durable=durable), FencedFileWriter(durable))
    serialization.write_tensors(tmp_path / "source", tensors)

    exports._write_weights(tmp_path / "source", tmp_path / "adapter_model.safetensors")

    written = serialization.read_tensors(tmp_path / "adapter_model.safetensors")
    assert set(written) == {"prompt_embeddings"}
    np.testing.assert_allclose(written["prompt_embeddings"], expected, rtol=1e-5, atol=1e-6)
