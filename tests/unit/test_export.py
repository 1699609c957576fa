"""Taking an adapter out of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabbit.errors import BadInput
from lorabbit_cli.local.export import export, read_job


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "sample"
    for name in ("adapter", "best", "checkpoint-3"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}", encoding="utf-8")
        (folder / name / "adapter_model.safetensors").write_bytes(name.encode())
    (folder / "job.yaml").write_text("name: sample\nseed: 7\nversions: {lorabbit: 0.1.0}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("which", ["adapter", "best", "checkpoint-3"])
def test_an_adapter_is_copied_as_it_is(run_folder: Path, tmp_path: Path, which: str):
    out = export(run_folder, tmp_path / "deep" / "out", which=which)

    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (out / "adapter_model.safetensors").read_bytes() == which.encode()


def test_what_exists_is_not_overwritten(run_folder: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()

    with pytest.raises(BadInput, match="exists already: remove it or name another folder with --out"):
        export(run_folder, tmp_path / "out")

    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_that_is_gone_is_refused_with_the_ones_there_are(run_folder: Path, tmp_path: Path):
    with pytest.raises(BadInput, match=r"has no checkpoint-1/ with an adapter; it has adapter, best, checkpoint-3"):
        export(run_folder, tmp_path / "out", which="checkpoint-1")


@pytest.mark.parametrize("which", ["../adapter", "checkpoint-0", "checkpoint-", "last", ""])
def test_only_names_of_adapters_are_taken(run_folder: Path, tmp_path: Path, which: str):
    with pytest.raises(BadInput, match="expected adapter, best, or checkpoint-<round>"):
        export(run_folder, tmp_path / "out", which=which)


def test_a_run_without_a_finished_round_says_so(tmp_path: Path):
    (tmp_path / "run").mkdir()

    with pytest.raises(BadInput, match="it has none: no round was finished"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="there is no run folder"):
        export(tmp_path / "nowhere", tmp_path / "out")


def test_a_failed_merge_leaves_nothing_behind(run_folder: Path, tmp_path: Path):
    (run_folder / "adapter" / "adapter_model.safetensors").unlink()

    with pytest.raises(BadInput, match=r"holds none of adapter_model\.safetensors"):
        export(run_folder, tmp_path / "out", merged=True)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_the_job_of_a_run_is_read_with_its_versions_left_out(run_folder: Path):
    assert read_job(run_folder).seed == 7


def test_a_merge_without_the_job_is_refused(run_folder: Path, tmp_path: Path):
    (run_folder / "job.yaml").unlink()

    with pytest.raises(BadInput, match=r"has no job\.yaml, so its base model is unknown"):
        export(run_folder, tmp_path / "out", merged=True)
