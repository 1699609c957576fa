"""Causal language modelling: instruction tuning on prompt and completion, or plain text.

Only what the model is to say is trained and scored: completions, the assistant's turns, or the
whole of a plain text. Rows are written plainly, or with the tokenizer's chat template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import IGNORED, Batch, Features, MeanLoss, RaggedRows, Scorer, Scores, TokenRows
from lorabbit_client.data.table import IntArray, Source, Table
from lorabbit_client.tasks.base import LearningTask, Records, max_tokens, pad_id

Messages: TypeAlias = "list[dict[str, str]]"
Segments: TypeAlias = "list[tuple[str, bool]]"
"""(text, whether it is a target of the model)"""
ASSISTANT = "assistant"


class CausalLanguageModeling(LearningTask):
    """Text to be continued."""

    name: ClassVar[str] = "causal-lm"
    main_metric: ClassVar[str] = "perplexity"
    has_classes: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "messages": ("messages", "conversations"),
        "prompt": ("prompt", "instruction", "question"),
        "completion": ("completion", "response", "output", "answer"),
        "text": ("text", "content"),
    }

    def labels(self, source: Source, spec: DataSpec) -> tuple[str, ...]:  # noqa: ARG002 - there are none
        """Return nothing: the vocabulary is the model's."""
        return ()

    def parse(self, table: Table, labels: tuple[str, ...], spec: DataSpec) -> Records:  # noqa: ARG002
        """Read every row as messages: a prompt is the user's, a plain text the assistant's alone."""
        messages, prompt, completion = (
            table.find(role, self.roles[role], spec.fields) for role in ("messages", "prompt", "completion")
        )
        rows: list[Messages]
        if messages is not None:
            rows = [_messages(table, messages, row) for row in range(len(table))]
        elif prompt is not None and completion is not None:
            pairs = zip(table.texts(prompt), table.texts(completion), strict=True)
            rows = [[{"role": "user", "content": a}, {"role": ASSISTANT, "content": b}] for a, b in pairs]
        else:
            texts = table.texts(self.column(table, "text", spec))
            rows = [[{"role": ASSISTANT, "content": text}] for text in texts]
        return Records({"messages": rows}, np.zeros(len(table), dtype=np.int64))

    def encode(self, records: Records, processor: Any, labels: tuple[str, ...], *, spec: DataSpec) -> Features:  # noqa: ANN401, ARG002
        """Tokenize segment by segment, so that a completion's tokens never depend on where the prompt ended."""
        if spec.chat_template and not processor.chat_template:
            raise BadInput("data.chat_template: the model's tokenizer has no chat template; set it to false")
        write = _templated_segments if spec.chat_template else _plain_segments
        segments = [write(messages, processor) for messages in records.columns["messages"]]
        flat = [text for row in segments for text, _ in row]
        ids = iter(processor(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
        opening, closing = ([], []) if spec.chat_template else _special_tokens(processor)
        rows = [
            truncate(
                [(opening, False), *((next(ids), is_target) for _, is_target in row), (closing, True)],
                max_tokens(processor, spec),
            )
            for row in segments
        ]
        for number, (_, is_target) in enumerate(rows, start=1):
            if not any(is_target[1:]):
                raise BadInput(f"data.max_length: nothing is left to learn of example {number}; raise it")
        return MaskedTokenRows(
            TokenRows({"input_ids": [row for row, _ in rows]}, pad_id(processor)),
            RaggedRows(is_target for _, is_target in rows),
        )


def _messages(table: Table, column: str, row: int) -> Messages:
    """Return a row's turns; raises BadInput unless each has a role and a content and one is the assistant's."""
    turns = table.value(column, row)
    whole = isinstance(turns, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not whole or not any(turn["role"] == ASSISTANT and turn["content"] for turn in turns):
        raise BadInput(
            f"{table.place(row)}: field {column!r} must be a list of turns with role and content,"
            f" one of them the {ASSISTANT}'s"
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _plain_segments(messages: Messages, tokenizer: Any) -> Segments:  # noqa: ANN401, ARG001 - as _templated
    """Write a prompt, a line end, the completion; longer talks with the role before each turn."""
    if len(messages) == 1:
        return [(messages[0]["content"], True)]
    if [turn["role"] for turn in messages] == ["user", ASSISTANT]:
        return [(messages[0]["content"] + "\n", False), (messages[1]["content"], True)]
    segments: Segments = []
    for turn in messages:
        is_target = turn["role"] == ASSISTANT
        segments += [(f"{turn['role']}: ", False), (turn["content"] + "\n", is_target)]
    return segments


def _templated_segments(messages: Messages, tokenizer: Any) -> Segments:  # noqa: ANN401 - any tokenizer
    """Render a conversation with the chat template; the assistant's turns are the targets."""
    segments: Segments = []
    written = ""
    for turn, message in enumerate(messages):
        is_target = message["role"] == ASSISTANT
        after = _render(messages[: turn + 1], tokenizer)
        asked = _render(messages[:turn], tokenizer, add_generation_prompt=True) if is_target and turn else written
        start = asked if after.startswith(asked) and asked.startswith(written) else written
        if not after.startswith(start):
            raise BadInput("data.chat_template: the model's chat template rewrites earlier turns; set it to false")
        segments += [(start[len(written) :], False), (after[len(start) :], is_target)]
        written = after
    return [(text, is_target) for text, is_target in segments if text]


def _render(messages: Messages, tokenizer: Any, **settings: bool) -> str:  # noqa: ANN401 - any tokenizer
    """Apply the chat template; raises BadInput when it refuses the turns."""
    from jinja2 import TemplateError  # noqa: PLC0415 - what the templates are written in

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BadInput(f"data.chat_template: the model's template refuses turns of {roles}: {error}") from error


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401 - any tokenizer
    """Return what the tokenizer puts before a text, and the token that ends it."""
    opening = list(tokenizer("")["input_ids"])
    end = tokenizer.eos_token_id
    opening = opening[:-1] if opening and opening[-1] == end and len(opening) > 1 else opening
    return opening, [] if end is None else [end]


def truncate(segments: Sequence[tuple[Sequence[int], bool]], longest_tokens: int) -> tuple[list[int], list[int]]:
    """Join segments to (tokens, loss mask), at most `longest_tokens` of them.

    A row that is too long loses the beginning of its prompt first, down to half of the length, then the end of the
    completion.
    """
    tokens = [token for ids, _ in segments for token in ids]
    is_target = [int(flag) for ids, flag in segments for _ in ids]
    excess = len(tokens) - longest_tokens
    if excess > 0:
        prompt = is_target.index(1) if 1 in is_target else len(is_target)
        drop = min(excess, max(prompt - longest_tokens // 2, 0))
        tokens, is_target = tokens[drop:], is_target[drop:]
    return tokens[:longest_tokens], is_target[:longest_tokens]


class MaskedTokenRows(Features):
    """Token rows with a loss mask: only the assistant's tokens have labels."""

    def __init__(self, tokens: TokenRows, loss_mask: RaggedRows) -> None:
        """Keep the rows."""
        self._tokens, self._loss_mask = tokens, loss_mask

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._loss_mask)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row."""
        return self._loss_mask.lengths

    def batch(self, rows: IntArray) -> Batch:
        """Return tokens and `labels`: the token itself where the loss mask is 1, IGNORED elsewhere."""
        import torch  # noqa: PLC0415 - only where a model runs

        batch = self._tokens.batch(rows)
        loss_mask = torch.from_numpy(self._loss_mask.padded(rows, 0))
        return {**batch, "labels": torch.where(loss_mask == 1, batch["input_ids"], IGNORED)}

    def units(self, batch: Batch) -> int:
        """Count the tokens that have a label; the first token of a row has none."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def scorer(self) -> Scorer:
        """Return perplexity and token accuracy."""
        return NextTokenScorer()


class NextTokenScorer:
    """Perplexity and next-token accuracy over target tokens."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._loss = MeanLoss()
        self._right = 0

    def add(self, rows: IntArray, batch: Batch, outputs: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Take in each token's most likely successor; only counts leave the device."""
        wanted = batch["labels"][:, 1:]
        counted = wanted != IGNORED
        self._loss.add(outputs, int(counted.sum()))
        self._right += int(((outputs["logits"][:, :-1].argmax(-1) == wanted) & counted).sum())

    def result(self) -> Scores:
        """Return perplexity and token_accuracy, weighted by target tokens."""
        loss = self._loss.value
        if loss is None:
            return Scores(0, None)
        values = {"perplexity": math.exp(min(loss, 700.0)), "token_accuracy": self._right / self._loss.units}
        return Scores(self._loss.units, loss, values)
