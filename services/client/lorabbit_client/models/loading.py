"""Base models and their processors, by the job's model name and task.

Weights come from files (see `source`) or from code (`tiny:`, `cnn:`). Everything random (a head that the checkpoint
lacks, a tiny model) depends on the job's seed alone, so every client builds the same model. Random parameters are
recorded, because they must be trained and exchanged: they are not part of the published base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec, Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit_client.models import cnn, tiny
from lorabbit_client.models.source import ModelSource

AUTO_CLASSES: dict[Task, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-pair-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
LABELED = frozenset(AUTO_CLASSES) - {"question-answering", "causal-lm"}
"""Tasks whose head has one output per label."""
IMAGE: Task = "image-classification"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model, ready to have some of its parameters made trainable."""

    model: nn.Module
    source: ModelSource
    fresh: frozenset[str] = field(default_factory=frozenset)
    """Names of parameters drawn at random because the checkpoint lacks them."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave torch's generators outside as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars, advice and deprecation warnings."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)


def load_processor(spec: JobSpec, source: ModelSource) -> Any:  # noqa: ANN401 - a tokenizer or an image processor
    """Load what turns raw text or images into the model's inputs; raises BadInput when there is none."""
    image = spec.model.task == IMAGE
    with quiet():
        if source.folder is None:
            return _built_in_processor(spec.model.name, image=image)
        try:
            if image:
                processor: Any = AutoImageProcessor
                return processor.from_pretrained(source.folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            wanted = "image processor" if image else "tokenizer"
            raise BadInput(
                f"model.name: {spec.model.name!r} has no {wanted} for {spec.model.task}: {_line(error)}"
            ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _built_in_processor(name: str, *, image: bool) -> Any:  # noqa: ANN401 - a tokenizer or an image processor
    """Make the processor of a model built from code."""
    family, _, which = name.partition(":")
    if family == "cnn" or which == "vit":
        if not image:
            raise BadInput(f"model.name: {name!r} classifies images; set model.task to {IMAGE!r}")
        side = {"height": tiny.IMAGE_SIDE, "width": tiny.IMAGE_SIDE}
        processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
        return processor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if which not in tiny.NAMES:
        near = get_close_matches(which, tiny.NAMES, n=1)
        hint = f"; did you mean 'tiny:{near[0]}'?" if near else ""
        raise BadInput(f"model.name: there is no {name!r}{hint} (known: {', '.join(f'tiny:{n}' for n in tiny.NAMES)})")
    if image:
        raise BadInput(f"model.name: {name!r} reads text; for {IMAGE} take 'tiny:vit' or 'cnn:1'")
    return tiny.tiny_tokenizer(which)


def load_model(spec: JobSpec, source: ModelSource, labels: Sequence[str]) -> LoadedModel:
    """Load or build the base model in the job's dtype, in eval mode and with no parameter trainable."""
    with quiet(), seeded(derive_seed(spec.seed, "model")):
        loaded = _load(spec, source, labels, getattr(torch, spec.model.dtype))
    model = loaded.model
    model.requires_grad_(requires_grad=False)
    model.eval()
    _check_length(spec, model)
    return LoadedModel(model, loaded.source, loaded.fresh)


def _load(spec: JobSpec, source: ModelSource, labels: Sequence[str], dtype: torch.dtype) -> LoadedModel:
    """Load from files, or build from code.

    transformers chooses what follows `dtype`: a model cast as a whole would round tables that it keeps in
    float32 (LLaMA's rotary frequencies), and answer otherwise than the one that a user loads.
    """
    family, _, which = spec.model.name.partition(":")
    named: dict[str, Any] = {}
    if spec.model.task in LABELED:
        named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if source.folder is None and family == "cnn":
        return LoadedModel(cnn.Cnn(which, len(labels)).to(dtype), source)
    auto = getattr(transformers, AUTO_CLASSES[spec.model.task])
    if source.folder is None:
        config = _drop(tiny.tiny_config(which, **named), spec.model.dropout)
        return LoadedModel(_fitting(lambda known: auto.from_config(known, dtype=dtype), spec, config), source)
    config = _drop(AutoConfig.from_pretrained(source.folder, local_files_only=True, **named), spec.model.dropout)

    def from_files(config: Any) -> Any:  # noqa: ANN401 - a model and its loading report
        return auto.from_pretrained(
            source.folder, config=config, dtype=dtype, local_files_only=True, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip

    model, report = _fitting(from_files, spec, config)
    if getattr(model.config, "pad_token_id", None) is None and getattr(model.config, "eos_token_id", None) is not None:
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    mismatched = (key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    return LoadedModel(model, source, frozenset(report["missing_keys"]) | frozenset(mismatched))


def _fitting(build: Any, spec: JobSpec, config: Any) -> Any:  # noqa: ANN401 - the auto classes are untyped
    """Build, turning "this architecture cannot do that task" into a sentence."""
    try:
        return build(config)
    except (ValueError, KeyError, OSError) as error:
        name, task = spec.model.name, spec.model.task
        raise BadInput(f"model.name: {name!r} cannot be loaded for {task}: {_line(error)}") from error


def _drop(config: Any, dropout: float | None) -> Any:  # noqa: ANN401 - the configs are untyped
    """Set every dropout probability of a configuration; leave them when None."""
    for key, value in (config.to_dict() if dropout is not None else {}).items():
        if "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, key, dropout)
    return config


def _check_length(spec: JobSpec, model: nn.Module) -> None:
    """Refuse a job whose texts may be longer than the model's table of positions."""
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if spec.model.task == IMAGE or not isinstance(most, int):
        return
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"}:
        most -= (getattr(config, "pad_token_id", None) or 0) + 1
    if spec.data.max_length > most:
        raise BadInput(
            f"data.max_length: {spec.data.max_length}, but {spec.model.name} reads at most {most} tokens; lower it"
        )


def _line(error: Exception) -> str:
    """Return the first line of an error, shortened."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."  # noqa: PLR2004 - one readable sentence
