"""Check that plain PEFT reaches the reported accuracy with what runs export.

    python benchmarks/papers/check_export.py RUN [RUN ...]

RUN is a run folder, or an entry of the cache of a comparison that kept adapters (`lorabbit compare --keep-adapters`),
of a text classification over LoRA. Its adapter is exported by `lorabbit export` and scored on the job's test rows by
`plain_peft.py`, in a process of its own without LoRAbbit: on the job's base model as it was loaded, or, where the
method made a base of its own, on the `base/` that is exported beside the adapter. Prints a line for each; the exit code
is 1 when an accuracy is not the reported one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorabbit.events.report import Report
from lorabbit_cli.local.export import export, read_job
from lorabbit_client.dataset import load_labels, load_test_records
from lorabbit_client.models.source import resolve

PLAIN = Path(__file__).resolve().parent / "plain_peft.py"
ROW = "| {:24} | {:32} | {:>8} | {:>10} | {:>10} |"


def main() -> None:
    """Check every run that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    print(ROW.format("run", "base", "rows", "reported", "plain PEFT"))
    print(ROW.format("---", "---", "---:", "---:", "---:"))
    with TemporaryDirectory() as scratch:
        same = [check(run, Path(scratch) / str(number)) for number, run in enumerate(parser.parse_args().runs)]
    sys.exit(0 if all(same) else 1)


def check(run: Path, scratch: Path) -> bool:
    """Export one run, score it elsewhere, and tell whether the accuracies are the same."""
    spec, report = read_job(run), Report.model_validate_json((run / "report.json").read_bytes())
    scratch.mkdir()
    adapter = export(run, scratch / "adapter")
    records = load_test_records(spec)
    texts = zip(records.columns["text"], records.classes.tolist(), strict=True)
    given: dict[str, Any] = {"labels": len(load_labels(spec)), "max_length": spec.data.max_length}
    given["rows"] = [{"text": text, "label": label} for text, label in texts]
    rows = scratch / "rows.json"
    rows.write_text(json.dumps(given), encoding="utf-8")
    pristine, own = str(resolve(spec.model.name).folder), adapter / "base"
    found = scored(str(own) if own.is_dir() else pristine, pristine, str(adapter), str(rows))
    reported = report.final.metrics["accuracy"]
    base = "base/ of the export" if own.is_dir() else spec.model.name.rpartition("/")[2]
    print(ROW.format(report.job, base, len(records), f"{reported:.4f}", f"{found:.4f}"), flush=True)
    return abs(found - reported) < 0.5 / len(records)


def scored(*arguments: str) -> float:
    """Run `plain_peft.py` without what this process has on its path."""
    command = [sys.executable, "-I", str(PLAIN), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - the script beside this one
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
