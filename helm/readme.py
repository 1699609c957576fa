"""The chart's README, made from the comments of its values: `python helm/readme.py helm/lorabbit` writes it.

A comment that begins with `# --` tells what the key under it means; `# ---- title ----` begins a section. A key
without such a comment has none in the README, which a test refuses.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KEY = re.compile(r"^( *)([A-Za-z]\w*):")
TITLE = re.compile(r"^# ---- (.+) ----$")
HEAD = """# Helm chart of LoRAbbit

<!-- Made from values.yaml by `python helm/readme.py helm/lorabbit`; do not edit. -->

Federated LoRA fine-tuning over RabbitMQ: a server with its standby, pools of unlike clients, RabbitMQ and Redis built
in, by an operator or external, network policies, monitoring, tests. Chart {version}, LoRAbbit {app}, Kubernetes
{kubernetes}.

```console
$ helm install fed helm/lorabbit --namespace federation --create-namespace --wait --timeout 10m
$ helm test fed --namespace federation --timeout 15m
```

[How to install and run it](../../docs/how-to/kubernetes.md) · [what to watch](../../docs/explanation/operations.md)

Ready-made values: {ready}.

A key that is not listed here is refused. A pool in `clientPools` takes every key of `clientDefaults`, and a `name`: the
client's identity is `<release>-<pool>-<ordinal>`.
"""


@dataclass(frozen=True)
class Entry:
    """One value: its section, its path, what the comment says."""

    section: str
    path: str
    meaning: str


def entries(text: str) -> Iterator[Entry]:
    """Read the documented values, in the order of the file."""
    section, comment, parents = "", list[str](), list[tuple[int, str]]()
    for line in text.splitlines():
        title, key = TITLE.match(line), KEY.match(line)
        if title is not None:
            section, comment = title.group(1), []
        elif line.lstrip().startswith("# -- "):
            comment = [line.lstrip().removeprefix("# -- ")]
        elif comment and line.lstrip().startswith("# "):
            comment.append(line.lstrip().removeprefix("# "))
        elif key is not None:
            depth = len(key.group(1))
            parents = [*((d, name) for d, name in parents if d < depth), (depth, key.group(2))]
            if comment:
                yield Entry(section, ".".join(name for _, name in parents), " ".join(comment))
            comment = []


def leaves(values: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401 - what YAML holds
    """Paths of all values that are no maps with keys."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path


def value_at(values: dict[str, Any], path: str) -> Any:  # noqa: ANN401 - as above
    """The value under a dotted path."""
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found


def readme(chart: Path) -> str:
    """Make the README of a chart's folder."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    text = (chart / "values.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    ready = ", ".join(f"[{path.name}]({path.name})" for path in sorted(chart.glob("values-*.yaml")))
    lines = [
        HEAD.format(
            version=about["version"], app=about["appVersion"], kubernetes=about["kubeVersion"].removesuffix("-0"),
            ready=ready,
        )
    ]  # fmt: skip
    section = ""
    for entry in entries(text):
        if entry.section != section:
            section = entry.section
            lines += [f"\n## {section[0].upper()}{section[1:]}\n", "| key | default | meaning |", "| --- | --- | --- |"]
        default = json.dumps(value_at(values, entry.path), separators=(", ", ": "))
        lines.append(f"| `{entry.path}` | `{default}` | {entry.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "helm/lorabbit")
    (folder / "README.md").write_text(readme(folder), encoding="utf-8")
