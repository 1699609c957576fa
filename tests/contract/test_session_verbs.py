"""What a session lets a method do to the model besides training it, and that the next client sees none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, score, silent, task_of, write_reviews

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.tensors import lora_math, serialization
from lorabbit.types import Tensors
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.training.workspace import LearningWorkspace

TARGETS = {
    "tiny:bert": ["query", "value", "dense"],
    "tiny:gpt2": ["c_attn", "c_fc"],
    "tiny:llama": ["q_proj", "down_proj"],
}


def workspace(spec: JobSpec) -> LearningWorkspace:
    torch.set_num_threads(1)
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu"))


def session(space: LearningWorkspace, spec: JobSpec, index: int = 0, **extra: Any) -> Any:
    return space.session(task_of(spec, index, **extra), PrivateState(), silent)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() and a[n].shape == b[n].shape for n in a)


def drawn(one: Any, rank: int, seed: int = 3) -> dict[str, Any]:
    """Factors of every module under LoRA."""
    generator = np.random.default_rng(seed)
    factors: dict[str, Any] = {}
    for path, weight in one.base_weights().items():
        a = generator.normal(0, 0.2, (rank, weight.shape[1])).astype(np.float32)
        b = generator.normal(0, 0.2, (weight.shape[0], rank)).astype(np.float32)
        factors |= lora_math.write(path, lora_math.Factors(a, b))
    return factors


def filled(tensors: Tensors) -> dict[str, Any]:
    """The same tensors with nothing at zero, so that decay would move everything."""
    generator = np.random.default_rng(7)
    return {n: (v.astype(np.float32) + generator.normal(0, 0.1, v.shape)).astype(v.dtype) for n, v in tensors.items()}


def answers(one: Any) -> torch.Tensor:
    batch = one._data.train.batch(np.arange(4))
    with torch.no_grad():
        logits: torch.Tensor = one.prepared_model().model.eval()(**batch).logits
    return logits


def spec_of(folder: Path, name: str = "tiny:bert", **model: Any) -> JobSpec:
    write_reviews(folder)
    return job(folder, model={"name": name, "lora": {"rank": 4, "alpha": 6, "targets": TARGETS[name]}, **model})


# ---- rank ----
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_at_another_rank_factors_are_zeros_of_that_rank_and_heads_stay(rank: int, dtype: str, tmp_path: Path):
    spec = spec_of(tmp_path, dtype=dtype)
    one = session(workspace(spec), spec)
    before = one.tensors()

    one.set_rank(rank)

    after = one.tensors()
    factors = {name for name in after if lora_math.is_factor(name)}
    assert {after[n].shape[0 if ".lora_A." in n else 1] for n in factors} == {rank}
    assert all(not after[n].any() and after[n].dtype == before[n].dtype for n in factors)
    assert same({n: after[n] for n in after.keys() - factors}, {n: before[n] for n in before.keys() - factors})
    assert list(after) == list(before)


@pytest.mark.parametrize("name", TARGETS)
def test_a_low_rank_filled_up_with_zeros_answers_alike(name: str, tmp_path: Path):
    spec = spec_of(tmp_path, name)
    one = session(workspace(spec), spec)
    low = drawn(one, 2)
    one.set_rank(2)
    one.load(low)
    expected = answers(one)

    one.set_rank(6)
    one.load({n: np.pad(v, ((0, 4), (0, 0)) if ".lora_A." in n else ((0, 0), (0, 4))) for n, v in low.items()})

    torch.testing.assert_close(answers(one), expected)


def test_factors_of_another_rank_are_refused_by_their_shape(tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    job_rank = one.tensors()
    one.set_rank(2)

    with pytest.raises(Refused) as refusal:
        one.load(job_rank)

    assert refusal.value.reason == "shapes"


def test_factors_of_another_rank_are_trained(tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    one.set_rank(2)
    start = drawn(one, 2)
    one.load(start)

    end = one.train().tensors

    assert all(end[name].shape == start[name].shape and not np.array_equal(end[name], start[name]) for name in start)


# ---- the base under LoRA ----
@pytest.mark.parametrize("name", TARGETS)
def test_a_shifted_base_answers_as_the_same_factors_in_the_adapter_do(name: str, tmp_path: Path):
    spec = spec_of(tmp_path, name)
    space = workspace(spec)
    one = session(space, spec)
    plain = answers(one)
    factors = drawn(one, 4)
    one.load(factors)
    expected = answers(one)

    other = session(space, spec)
    other.set_base_delta(factors)
    shifted = answers(other)

    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shifted, plain, atol=1e-2)


def test_a_shift_is_absolute(tmp_path: Path):
    spec = spec_of(tmp_path)
    first, second = session(workspace(spec), spec), session(workspace(spec), spec)
    first.set_base_delta(drawn(first, 3, seed=1))
    answers(first)
    first.set_base_delta(drawn(first, 5, seed=2))
    second.set_base_delta(drawn(second, 5, seed=2))

    assert torch.equal(answers(first), answers(second))


def test_pristine_weights_are_given_whatever_the_shift(tmp_path: Path):
    spec = spec_of(tmp_path, "tiny:gpt2")
    one = session(workspace(spec), spec)
    before = one.base_weights()
    one.set_base_delta(drawn(one, 3))
    answers(one)

    assert same(one.base_weights(), before)
    assert all(value.dtype == np.float32 for value in before.values())
    assert set(before) == set(lora_math.modules(one.tensors()))


def test_a_shift_stays_for_the_next_client_that_asks_for_it_and_for_no_other(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    plain, factors = answers(one), drawn(one, 3)
    one.set_base_delta(factors)
    shifted = answers(one)
    name = next(iter(space._model.base._changed))
    copies = space._model.base._copies
    kept = copies[name].clone()
    copies[name].zero_()  # would show if the shift were computed again

    asking = session(space, spec, 1)
    asking.set_base_delta({name: value.copy() for name, value in factors.items()})
    again = answers_on(asking, one)
    copies[name].copy_(kept)
    other = session(space, spec, 1)

    assert torch.equal(again, shifted)
    assert torch.equal(answers_on(other, one), plain)


def answers_on(one: Any, rows: Any) -> torch.Tensor:
    """Answers of one session's model on another's rows."""
    one._data = rows._data
    return answers(one)


def test_no_factors_undo_a_shift(tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    plain = answers(one)
    one.set_base_delta(drawn(one, 3))
    answers(one)

    one.set_base_delta({})

    assert torch.equal(answers(one), plain)


def test_modules_that_a_shift_does_not_name_stay_pristine(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    path = next(iter(one.base_weights()))
    before = {name: value.clone() for name, value in space._model.base.tensors.items()}
    one.set_base_delta({n: v for n, v in drawn(one, 3).items() if n.startswith(path + ".")})
    answers(one)

    moved = {name for name, value in space._model.base.tensors.items() if not torch.equal(value, before[name])}

    assert moved == {path.removeprefix("base_model.model.") + ".weight"}


@pytest.mark.parametrize("change", ["names", "shapes", "half"])
def test_factors_that_do_not_fit_the_base_are_refused(change: str, tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    path = next(iter(one.base_weights()))
    a, b = (drawn(one, 2)[f"{path}.lora_{factor}.weight"] for factor in "AB")
    wrong: dict[str, Any] = {
        "names": lora_math.write("other", lora_math.Factors(a, b)),
        "shapes": lora_math.write(path, lora_math.Factors(a[:, :-1], b)),
        "half": {f"{path}.lora_A.weight": a},
    }

    with pytest.raises(Refused) as refusal:
        one.set_base_delta(wrong[change])

    assert refusal.value.reason == ("shapes" if change == "shapes" else "names")


def test_lora_on_a_convolution_has_no_base_weights(tmp_path: Path):
    model = {"name": "cnn:1", "task": "image-classification", "lora": {"rank": 2, "targets": ["conv1"]}}
    spec = job(tmp_path, model=model, data=data_of(tmp_path, "image-classification"))
    one = session(workspace(spec), spec)

    with pytest.raises(BadInput, match=r"model\.lora\.targets: conv1 is a Conv2d"):
        one.base_weights()


# ---- the whole model ----
@pytest.mark.parametrize("kind", ["lora", "adapter", "head", "bitfit", "full"])
def test_the_whole_model_has_the_models_own_names_and_a_trained_head_is_in_it(kind: str, tmp_path: Path):
    spec = spec_of(tmp_path, trainable=kind)
    full = spec_of(tmp_path, trainable="full")
    expected = session(workspace(full), full).tensors()
    one = session(workspace(spec), spec)
    one.load({n: v + np.float32(1) for n, v in one.tensors().items() if n.endswith("classifier.weight")})

    one.select("whole")

    whole = one.tensors()
    assert whole.keys() == expected.keys()
    differing = {n for n in whole if whole[n].tobytes() != expected[n].tobytes()}
    assert differing == {"classifier.weight"}


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_while_the_whole_model_is_selected_its_adapter_adds_nothing(kind: str, tmp_path: Path):
    spec = spec_of(tmp_path, trainable=kind)
    one = session(workspace(spec), spec)
    before = answers(one)
    one.load({n: v for n, v in filled(one.tensors()).items() if ".lora_" in n or ".up." in n})
    moved = answers(one)

    one.select("whole")
    whole = answers(one)
    one.select("adapter")

    torch.testing.assert_close(whole, before)
    assert not torch.allclose(moved, before, atol=1e-2)
    assert torch.equal(answers(one), moved)


def test_a_loaded_whole_model_is_what_the_adapter_then_stands_on(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    factors = drawn(one, 4)
    one.load(factors)
    expected = answers(one)
    weights = one.base_weights()
    merged = {
        path.removeprefix("base_model.model.") + ".weight": weights[path]
        + lora_math.read(factors, path, one.scaling).product().astype(np.float32)
        for path in weights
    }

    other = session(space, spec)
    other.select("whole")
    other.load(merged)
    other.select("adapter")

    torch.testing.assert_close(answers(other), expected, rtol=1e-4, atol=1e-5)
    assert same(other.base_weights(), weights)


class Unread(dict[str, Any]):
    """Tensors that nobody may look at."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    __iter__ = items = values = keys = __getitem__  # type: ignore[assignment]


def merged(one: Any, factors: Tensors) -> tuple[dict[str, Any], str]:
    """The whole model with factors merged into it, and its hash."""
    weights = one.base_weights()
    one.select("whole")
    whole = dict(one.tensors())
    one.select("adapter")
    for path, weight in weights.items():
        name = path.removeprefix("base_model.model.") + ".weight"
        whole[name] = weight + lora_math.read(factors, path, one.scaling).product().astype(np.float32)
    return whole, serialization.tensors_sha256(whole)


def test_a_base_to_stand_on_answers_as_its_factors_did_and_a_shift_goes_on_top_of_it(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    below, above = drawn(one, 4, seed=1), drawn(one, 3, seed=2)
    whole, name = merged(one, below)
    one.set_base_delta(below)
    expected = answers(one)
    other = session(space, spec)

    other.use_base(whole, name)
    standing = answers(other)
    other.set_base_delta(above)
    shifted = answers(other)
    other.set_base_delta({})

    torch.testing.assert_close(standing, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(answers(other), standing)
    both = {
        n: np.concatenate([below[n], above[n]], axis=0 if ".lora_A." in n else 1)
        for n in below
        if lora_math.is_factor(n)
    }
    third = session(workspace(spec), spec)
    third.set_base_delta(both)
    torch.testing.assert_close(shifted, answers(third), rtol=1e-4, atol=1e-5)


def test_a_base_to_stand_on_stays_for_the_next_client_that_asks_for_it_and_for_no_other(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    plain = answers(one)
    whole, name = merged(one, drawn(one, 4))
    one.use_base(whole, name)
    standing = answers(one)

    asking = session(space, spec, 1)
    asking.use_base(Unread(), name)
    again = answers_on(asking, one)
    other = session(space, spec, 1)

    assert torch.equal(again, standing)
    assert torch.equal(answers_on(other, one), plain)


def test_a_base_of_another_hash_or_shape_is_refused_and_nothing_moves(tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    plain = answers(one)
    whole, _ = merged(one, drawn(one, 4))
    first = next(iter(whole))
    cut = whole | {first: whole[first][:1]}

    with pytest.raises(Refused, match="not the one that the plan names"):
        one.use_base(whole, "0" * 64)
    with pytest.raises(Refused, match="shape"):
        one.use_base(cut, serialization.tensors_sha256(cut))

    assert torch.equal(answers(one), plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_whole_model_moves_everywhere_and_the_next_client_sees_none_of_it(dtype: str, tmp_path: Path):
    spec = spec_of(tmp_path, dtype=dtype)
    space = workspace(spec)
    fresh = session(space, spec, 1)
    fresh.select("whole")
    pristine = fresh.tensors()
    one = session(space, spec)
    one.select("whole")

    trained = one.train().tensors

    later = session(space, spec, 1)
    adapter = later.tensors()
    later.select("whole")
    unmoved = {name for name in trained if trained[name].tobytes() == pristine[name].tobytes()}
    # Positions beyond every text, and the second kind of text, get no gradient; whole tables still move.
    assert unmoved == set()
    assert same(later.tensors(), pristine)
    assert same(adapter, session(workspace(spec), spec, 1).tensors())


def test_training_the_adapter_after_the_whole_model_moves_the_adapter_alone(tmp_path: Path):
    spec = spec_of(tmp_path)
    one = session(workspace(spec), spec)
    one.select("whole")
    one.train()
    whole = one.tensors()
    one.select("adapter")
    start = one.tensors()

    end = one.train().tensors

    one.select("whole")
    after = one.tensors()
    assert {n for n in after if after[n].tobytes() != whole[n].tobytes()} == {"classifier.weight", "classifier.bias"}
    assert not same(start, end)


def test_what_is_scored_is_what_the_session_holds(tmp_path: Path):
    spec = spec_of(tmp_path)
    space = workspace(spec)
    one = session(space, spec)
    start = one.tensors()
    plain = score(space, spec, start).loss
    factors = drawn(one, 4)
    one.set_base_delta(factors)
    shifted = space.evaluate(task_of(spec), one, silent).loss

    assert shifted == pytest.approx(score(space, spec, {**start, **factors}).loss, rel=1e-4)
    assert score(space, spec, start).loss == plain
    assert shifted != plain
