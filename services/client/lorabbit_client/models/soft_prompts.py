"""Soft prompts through PEFT: prompt tuning, p-tuning and prefix tuning, named as PEFT saves them.

Lester et al., 2021, arXiv 2104.08691 (prompt); Liu et al., 2021, arXiv 2103.10385 (p-tuning); Li and Liang, 2021,
arXiv 2101.00190 (prefix). P-tuning trains an encoder that makes the prompt. The encoder is what travels, since
averages of what it makes could not be put back into it; the export holds what the averaged encoder makes.

D1  A prompt starts at vectors of the vocabulary (Lester et al., section 3.2), drawn from the job's seed.
D2  A prefix is trained directly, without the reparametrization that its paper drops after training.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import JobSpec
from lorabbit.tensors.soft_prompts import EMBEDDINGS, ENCODER
from lorabbit.types import Json
from lorabbit_client.models.lora import ADAPTER, TASK_TYPES, config_file

KINDS = ("prompt", "p-tuning", "prefix")
PREPENDS_TOKENS = ("prompt", "p-tuning")
"""Kinds that prepend tokens to the text, which shifts predictions per token."""
TOKEN_LEVEL_TASKS = ("token-classification", "question-answering")
PROBE_TOKENS = 4


def wrap_prompt(spec: JobSpec, model: nn.Module, heads: Sequence[str]) -> tuple[PeftModel, dict[str, Json]]:
    """Put PEFT's soft prompt before a model; returns its wrapper and the content of adapter_config.json.

    Raises BadInput where PEFT cannot do that for this model or task.
    """
    _check(spec, model)
    settings: dict[str, Any] = {
        "task_type": TASK_TYPES[spec.model.task],
        "num_virtual_tokens": spec.model.virtual_tokens,
        "modules_to_save": list(heads) or None,
        **_shape(model),
    }
    try:
        wrapped = get_peft_model(model, _config(spec.model.trainable, settings))
        _probe(wrapped)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise BadInput(
            f"model.trainable: peft cannot do {spec.model.trainable!r} with {spec.model.name} for {spec.model.task} "
            f"({str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__}); use lora"
        ) from error
    if spec.model.trainable in PREPENDS_TOKENS and spec.model.task == "causal-lm":
        wrapped.register_forward_hook(_drop_prompt_logits, with_kwargs=True)
    return wrapped, config_file(wrapped, spec.model.name)


def prompt_names(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """Return every trained parameter: heads as PEFT saves them, the prompt as it does or, in p-tuning, its encoder."""
    saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    trained = {(p.data_ptr(), p.shape): p for p in wrapped.parameters() if p.requires_grad}
    named: dict[str, torch.Tensor] = {
        name: trained[value.data_ptr(), value.shape]
        for name, value in saved.items()
        if (value.data_ptr(), value.shape) in trained
    }
    encoder: Any = wrapped.prompt_encoder[ADAPTER]
    inner = dict(encoder.named_parameters())
    if list(inner) == ["embedding.weight"]:
        named[EMBEDDINGS] = inner["embedding.weight"]
    else:
        named |= {f"{ENCODER}.{name}": value for name, value in inner.items()}
    if {id(value) for value in named.values()} != {id(value) for value in trained.values()}:
        raise LoRAbbitError("this version of peft saves other tensors than it trains; pin the version in constraints")
    return named


def _config(kind: str, settings: dict[str, Any]) -> PeftConfig:
    if kind == "prompt":
        return PromptTuningConfig(prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, **settings)
    if kind == "prefix":
        return PrefixTuningConfig(**settings)
    return PromptEncoderConfig(encoder_hidden_size=settings["token_dim"], **settings)


def _shape(model: nn.Module) -> dict[str, int]:
    """Name the sizes that PEFT looks for under fewer names than models have."""
    config: Any = getattr(model, "config", None)
    names = {
        "token_dim": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
    }
    return {ours: int(size) for ours, theirs in names.items() if isinstance(size := getattr(config, theirs, None), int)}


def _check(spec: JobSpec, model: nn.Module) -> None:
    """Refuse what PEFT would do without a word, and wrongly."""
    kind, task = spec.model.trainable, spec.model.task
    if task not in TASK_TYPES:
        raise BadInput(f"model.trainable: {kind!r} writes tokens before a text, and {task} has none; use lora")
    if kind in PREPENDS_TOKENS and task in TOKEN_LEVEL_TASKS:
        raise BadInput(
            f"model.trainable: {kind!r} moves every token of a text, and {task} answers by token; use prefix or lora"
        )
    if kind in PREPENDS_TOKENS and task not in TOKEN_LEVEL_TASKS and hasattr(model, "score"):
        raise BadInput(
            f"model.trainable: behind {kind!r}, {spec.model.name} would read its answer off the padding; "
            "use prefix or lora"
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and spec.data.max_length + spec.model.virtual_tokens > most:
        raise BadInput(
            f"model.virtual_tokens: {spec.model.virtual_tokens} and data.max_length {spec.data.max_length} are more "
            f"than the {most} tokens that {spec.model.name} reads; lower one of them"
        )


def _drop_prompt_logits(_module: nn.Module, _given: object, named: dict[str, Any], out: Any) -> Any:  # noqa: ANN401
    """Drop the logits at the prompt's tokens, so that the others align with the labels."""
    out.logits = out.logits[:, -named["input_ids"].shape[1] :]
    return out


def _probe(wrapped: PeftModel) -> None:
    """Send a text of a few tokens through; raises when the prompt makes no difference to the answer."""
    device = next(wrapped.parameters()).device
    ids = torch.ones((2, PROBE_TOKENS), dtype=torch.long, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out: Any = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids))
    answer = next(value for name, value in out.items() if name in {"logits", "start_logits"})
    answer.float().square().sum().backward()
    encoder: Any = wrapped.prompt_encoder[ADAPTER]
    gradient = encoder.embedding.weight.grad
    wrapped.zero_grad(set_to_none=True)
    if gradient is None or not bool(gradient.any()):
        raise ValueError("the model does not look at the prompt")
