"""Is the federated quickstart better than a linear probe? The same splits, several seeds, paired.

    python benchmarks/quickstart.py [--job examples/quickstart.yaml] [--set KEY=VALUE ...] [--seeds 1 2 3] [--out FILE]

A seed decides the held-out rows, the partition and everything drawn. The probe is a logistic regression
on the frozen model's mean-pooled embeddings with all clients' rows in one place; its penalty is the best
of three on the very rows that it is scored on, which favors it. The quickstart's own settings were chosen
on seed 0, so seed 0 is left out unless asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from measure import Table, machine
from scipy import stats
from transport import LORABBIT

from lorabbit import job_loader
from lorabbit.job.spec import JobSpec

PENALTIES = (0.1, 1.0, 10.0)


def federated(job: Path, seed: int, changes: list[str]) -> tuple[float, float]:
    """Run the job with a seed; returns the accuracy after the first scored round and after the last."""
    options = [word for change in (*changes, f"seed={seed}") for word in ("--set", change)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [*LORABBIT, "run", str(job), *options, "--format", "json", "--out", scratch]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - a command of ours
        report = json.loads(done.stdout)
    scored = [each["metrics"]["accuracy"] for each in report["rounds"] if each["metrics"]]
    return scored[0], scored[-1]


def probe(spec: JobSpec) -> tuple[float, float, int]:
    """Accuracy of a linear probe and of the largest class on the spec's held-out rows, and their number."""
    import torch  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    from lorabbit_client.dataset import load_client  # noqa: PLC0415 - the same rows as the federation's
    from lorabbit_client.models.source import resolve  # noqa: PLC0415

    folder = resolve(spec.model.name).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clients = [load_client(spec, k, spec.clients, processor=tokenizer) for k in range(spec.clients)]
    model = AutoModel.from_pretrained(folder).eval()

    def embed(examples) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN001 - Examples
        order = np.argsort(examples.lengths, kind="stable")
        found, labels = [], []
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                batch = examples.batch(order[start : start + 64])
                labels.append(batch.pop("labels").numpy())
                hidden = model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                found.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(found), np.concatenate(labels)

    train = [embed(client.train) for client in clients]
    test = [embed(client.test) for client in clients]
    x, y = (np.concatenate([pair[i] for pair in train]) for i in (0, 1))
    xt, yt = (np.concatenate([pair[i] for pair in test]) for i in (0, 1))
    scores = [LogisticRegression(C=c, max_iter=2000).fit(x, y).score(xt, yt) for c in PENALTIES]
    return max(scores), float(np.mean(yt == np.bincount(y).argmax())), len(yt)


def main() -> None:
    """Run every seed and print the table with the paired difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the job")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        first, last = federated(arguments.job, seed, arguments.set)
        linear, majority, held_out = probe(
            job_loader.load(arguments.job, arguments.set).model_copy(update={"seed": seed})
        )
        row = {"seed": seed, "held out": held_out, "majority": majority, "probe": linear, "first scored": first}
        rows.append({**row, "last round": last, "over the probe": last - linear})
        print(rows[-1], flush=True)
    gains = np.array([row["over the probe"] for row in rows])
    if len(gains) > 1:
        half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
        print(f"over the probe: {gains.mean():+.4f}, 95 % confidence interval of the mean {half:.4f} to either side")
    Table("The quickstart and a linear probe", rows, machine()).show(arguments.out)


if __name__ == "__main__":
    main()
