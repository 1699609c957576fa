"""The module map in docs/explanation/architecture.md lists exactly the packages and modules in services/."""

from __future__ import annotations

import re

from tree import ROOT, dotted, modules

ROW = re.compile(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]*) \|$", re.MULTILINE)


def test_the_module_map_lists_every_module() -> None:
    text = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Module map")[2].partition("\n## ")[0]
    listed = {package: set(re.findall(r"`(\w+)`", names)) for package, names in ROW.findall(section)}
    there: dict[str, set[str]] = {}
    for path in modules():
        package, _, module = dotted(path).rpartition(".")
        if path.stem == "__init__":
            there.setdefault(dotted(path), set())
        else:
            there.setdefault(package, set()).add(module)

    assert listed == there
