"""Merging: an adapter folded into its base model, as a plain transformers folder.

The model is built exactly as a client builds it, from the job, so that whatever was drawn at random
from the job's seed is the same here; then the adapter's tensors are loaded and folded in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.tensors import serialization
from lorabbit.types import Tensors
from lorabbit_client.dataset import load_labels
from lorabbit_client.models.loading import LABELED, load_model, load_processor
from lorabbit_client.models.soft_prompts import KINDS
from lorabbit_client.models.source import resolve
from lorabbit_client.models.trainable import make_trainable
from lorabbit_client.training.session import write_tensors

OUTPUT_LAYERS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


def merge(spec: JobSpec, tensors_file: Path, out: Path) -> None:
    """Write the merged model and its tokenizer to the folder `out`; raises BadInput where that cannot be."""
    if spec.model.trainable == "adapter":
        raise BadInput("bottleneck adapters are modules of their own and cannot be merged; export without --merged")
    if spec.model.trainable in KINDS:
        raise BadInput("a soft prompt stands before the model and cannot be merged into it; export without --merged")
    adapter = serialization.read_tensors(tensors_file)
    source = resolve(spec.model.name)
    loaded = load_model(spec, source, _labels(spec, adapter))
    if not isinstance(loaded.model, PreTrainedModel):
        raise BadInput(f"{spec.model.name} is no transformers model, so there is nothing to merge into")
    trainable = make_trainable(spec, loaded, torch.device("cpu"))
    write_tensors(trainable, adapter)
    whole: Any = trainable.model
    if isinstance(whole, PeftModel):
        whole = whole.merge_and_unload()
    whole.save_pretrained(out)
    load_processor(spec, source).save_pretrained(out)


def _labels(spec: JobSpec, adapter: Tensors) -> Sequence[str]:
    """Name the labels as the data does; where the data is not at hand, number them."""
    if spec.model.task not in LABELED:
        return ()
    try:
        return load_labels(spec, Path())
    except BadInput:
        sizes = [value.shape[0] for name, value in adapter.items() if name.endswith(OUTPUT_LAYERS)]
        if not sizes:
            raise
        return [f"LABEL_{i}" for i in range(sizes[-1])]
