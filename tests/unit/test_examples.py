"""The example jobs: valid, opening with their command, and on data that is there without a network."""

from __future__ import annotations

import re
from pathlib import Path

from cases import for_each

from lorabbit.job_loader import load
from lorabbit.methods import registry
from lorabbit_client.dataset import describe

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@for_each(path=EXAMPLES)
def test_an_example_opens_with_the_command_that_runs_it(path: Path):
    opening = path.read_text(encoding="utf-8").split("\n\n")[0]

    assert f"lorabbit run examples/{path.name}" in opening


@for_each(path=EXAMPLES)
def test_an_example_is_a_job_whose_data_every_machine_has(path: Path):
    job = load(path)

    registry.build(job).check(job)
    outline = describe(job, job.clients, ROOT)

    assert len(outline.clients) == job.clients
    assert all(share.train > 0 and share.test > 0 for share in outline.clients)


def test_the_examples_cover_every_task_trainable_and_method():
    jobs = [load(path) for path in EXAMPLES]

    assert {job.model.task for job in jobs} == {
        "text-classification", "text-pair-classification", "token-classification", "question-answering",
        "causal-lm", "image-classification",
    }  # fmt: skip
    assert {job.model.trainable for job in jobs} == {"lora", "full", "bitfit", "adapter", "head"}
    assert {job.method.name for job in jobs} == set(registry.METHODS)


@for_each(path=EXAMPLES)
def test_every_knob_of_an_example_is_commented(path: Path):
    knob = re.compile(r"^\s*[a-z_]+: [^#\s]")

    bare = [line for line in path.read_text(encoding="utf-8").splitlines() if knob.match(line) and " #" not in line]

    assert bare == []
