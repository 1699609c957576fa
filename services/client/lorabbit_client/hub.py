"""Datasets of the Hugging Face hub, from its cache where the hub does not answer.

The library itself retries an absent network for half a minute; so the hub is asked one question
first, with seconds to answer, and without an answer only the cache is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorabbit.errors import BadInput
from lorabbit_client.model_source import HUB_ANSWER_SECONDS, within
from lorabbit_client.tables import Source, Table

TEST_SPLITS = ("test", "dev", "validation", "valid", "val")
"""Names of a test split, best first: a development split serves where there is no other."""


def read_hub(name: str, config: str | None) -> Source:
    """Return a hub dataset by its name and configuration; raises BadInput when neither hub nor cache has it."""
    import datasets  # noqa: PLC0415 - heavy, and only hub datasets need it

    datasets.disable_progress_bars()
    reachable, why = _ask(name)
    try:
        with _offline(not reachable):
            splits = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises dozens of unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"data.source: {name!r} is neither built in nor a file or folder, and not to be had from the hub:"
            f" {reason if reachable else why}"
        ) from error
    if "train" not in splits:
        raise BadInput(f"data.source: hub dataset {name!r} has no train split; it has {', '.join(splits)}")
    train = _table(splits["train"], f"hub dataset {name}, train")
    tests = (_table(splits[split], f"hub dataset {name}, {split}") for split in TEST_SPLITS if split in splits)
    test = next((table for table in tests if not _withheld(table)), None)
    return Source(train, test, names_of=_class_names(splits["train"].features))


def _ask(name: str) -> tuple[bool, str]:
    """Tell whether the hub answers that it has a dataset, and if not, why."""
    from huggingface_hub import HfApi, constants  # noqa: PLC0415 - as above
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return False, "it is switched off by HF_HUB_OFFLINE, and its cache here has no such dataset"
    answer = within(HUB_ANSWER_SECONDS, lambda: HfApi().dataset_info(name, timeout=HUB_ANSWER_SECONDS))
    if isinstance(answer, RepositoryNotFoundError | HFValidationError):
        return False, "it has no such dataset (or a private one: log in first)"
    return answer is None, "it cannot be reached, and its cache here has no such dataset"


@contextmanager
def _offline(only_cache: bool) -> Iterator[None]:  # noqa: FBT001 - the one thing to say
    """Keep the hub's library off the network; its own switch is read from the environment once, at import."""
    from huggingface_hub import constants  # noqa: PLC0415 - as above

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or only_cache
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _table(split: Any, name: str) -> Table:  # noqa: ANN401 - datasets.Dataset
    return Table(name, {column: list(split[column]) for column in split.column_names})


def _withheld(table: Table) -> bool:
    """Tell whether a split's labels are kept secret, as those of GLUE's test splits are (-1 everywhere)."""
    labels = table.columns.get("label")
    return labels is not None and len(labels) > 0 and all(label == -1 for label in labels)


def _class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the label tables that a hub dataset states, by column."""
    found: dict[str, tuple[str, ...]] = {}
    for column, feature in features.items():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            found[column] = tuple(names)
    return found
