"""What LoRAbbit adds to training: the quickstart as a bare PyTorch/PEFT loop, embedded, and over services.

    python benchmarks/overhead.py [--job examples/quickstart.yaml] [--set KEY=VALUE ...] [--repeat 1] [--out FILE]

The bare loop is what one would write by hand for one process: one PEFT model, the same rows in the
same batches, AdamW, a weighted average of the state dicts, an evaluation a round; no messages, no
checks, no files. It runs with torch's default number of threads. Timed is the whole command, from a
cold start to the result, because that is what a user waits for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import Table, machine, run_measured
from transport import LORABBIT, federation

from lorabbit import job_loader
from lorabbit.job.spec import JobSpec


def bare(spec: JobSpec) -> dict[str, float]:
    """Fine-tune by federated averaging in a plain loop; returns the last round's scores."""
    model, clients = build(spec)
    return average(spec, model, clients)


def build(spec: JobSpec):  # noqa: ANN201 - a PEFT model, ClientData
    """Make the model and every client's rows."""
    import torch  # noqa: PLC0415 - a cold start is part of what is timed
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415

    from lorabbit_client.dataset import load_client  # noqa: PLC0415 - the same rows as the federation's
    from lorabbit_client.models.source import resolve  # noqa: PLC0415

    folder = resolve(spec.model.name).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clients = [load_client(spec, k, spec.clients, processor=tokenizer) for k in range(spec.clients)]
    torch.manual_seed(spec.seed)
    dropout = spec.model.dropout
    drop = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(clients[0].labels), **drop)
    lora = spec.model.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets else None,
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        task_type="SEQ_CLS",
    )
    model = get_peft_model(base, config)
    return model, clients


def average(spec: JobSpec, model, clients) -> dict[str, float]:  # noqa: ANN001 - as above
    """Run the rounds."""
    import torch  # noqa: PLC0415
    from peft import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: PLC0415

    from lorabbit_client.training.batching import batches, steps_of  # noqa: PLC0415 - the same batches

    state = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    scores: dict[str, float] = {}
    for round_number in range(1, spec.rounds + 1):
        total = sum(len(c.train) for c in clients)
        mean = {name: torch.zeros_like(value) for name, value in state.items()}
        for k, client in enumerate(clients):
            set_peft_model_state_dict(model, state)
            model.train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(
                parameters, lr=spec.local.learning_rate, weight_decay=spec.local.weight_decay, fused=True
            )
            steps = steps_of(spec.local, len(client.train))
            for positions in batches(client.train.lengths, spec.local.batch_size, steps, seed=1000 * round_number + k):
                loss = model(**client.train.batch(positions)).loss
                loss.backward()
                if spec.local.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, spec.local.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for name, value in get_peft_model_state_dict(model).items():
                mean[name] += value * (len(client.train) / total)
        state = mean
        if spec.evaluates(round_number):
            set_peft_model_state_dict(model, state)
            scores = evaluate(model, clients, spec.evaluation.batch_size)
    return scores


def evaluate(model, clients, batch_size: int) -> dict[str, float]:  # noqa: ANN001 - a PEFT model, ClientData
    """Score a model on every client's test split, rows of like length together."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    model.eval()
    right = seen = 0
    with torch.inference_mode():
        for client in clients:
            order = np.argsort(client.test.lengths, kind="stable")
            for start in range(0, len(order), batch_size):
                batch = client.test.batch(order[start : start + batch_size])
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
                seen += len(labels)
    return {"accuracy": right / seen}


def time_bare(job: Path) -> float:
    """Run this file's bare loop in a process of its own."""
    return run_measured([sys.executable, __file__, "--job", str(job), "--bare"]).seconds


def time_embedded(job: Path) -> float:
    """Run `lorabbit run`."""
    with tempfile.TemporaryDirectory() as scratch:
        return run_measured([*LORABBIT, "run", str(job), "--out", scratch]).seconds


def time_services(job: Path) -> float:
    """Submit the job to a server with client processes over RabbitMQ and Redis, all started before."""
    spec = job_loader.load(job)
    with federation(spec.clients, clustered=False) as running:
        SERVICES.update(running.versions())
        began = time.perf_counter()
        running.command("submit", str(job))
        running.command("watch", spec.name)
        return time.perf_counter() - began


SERVICES: dict[str, str] = {}
"""Versions of broker and store that were measured."""
WAYS = {
    "bare PyTorch/PEFT loop": time_bare,
    "lorabbit run (embedded)": time_embedded,
    "RabbitMQ + Redis, one process a client": time_services,
}


def main() -> None:
    """Time all ways in one run and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the job")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.bare:
        print(bare(job_loader.load(arguments.job)))
        return
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / arguments.job.name
        job.write_text(job_loader.dump(job_loader.load(arguments.job, arguments.set)), encoding="utf-8")
        for _ in range(arguments.repeat):
            for way, run in WAYS.items():
                times[way].append(run(job))
    medians = {way: statistics.median(values) for way, values in times.items()}
    first = next(iter(medians.values()))
    rows = [{"way": way, "seconds": value, "ratio": value / first} for way, value in medians.items()]
    facts = {**machine(), **SERVICES, "repeats": str(arguments.repeat)}
    Table(f"Overhead on {arguments.job.name}", rows, facts).show(arguments.out)


if __name__ == "__main__":
    main()
