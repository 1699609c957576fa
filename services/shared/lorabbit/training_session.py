"""Session: what a method's client half may do with one client's model, data and private state.

Methods speak NumPy and named tensors; torch stays behind these verbs. A client trains an adapter of
the base model that all clients share (`Session`), or a model of its own (`PersonalSession`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, Unpack

from lorabbit.job.spec import LocalSpec
from lorabbit.types import Array, ClientProfile, Facts, Json, Tensors

GradientTerm: TypeAlias = Callable[[str, Any, Any], Any]
"""(name, value, value at the start of the training) -> what to add to the gradient of that tensor.

Values are of the session's own kind (torch or NumPy): write it with operators only.
"""
Part: TypeAlias = Literal["adapter", "whole"]
"""Which tensors of a model a session speaks of: what the job's `model.trainable` names, or everything."""
Layer: TypeAlias = Literal["features", "representation"]
"""Where a classifier is looked into: what its trunk sees, or the input of its last layer."""
Difficulty: TypeAlias = Literal["fisher", "loss", "length", "rarity", "rarity-mean"]
Sensitivity: TypeAlias = Literal["relative", "abs", "gain"]
Direction: TypeAlias = Literal["random", "adversarial"]


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a local training returned."""

    tensors: Tensors
    num_examples: int
    loss: float
    steps: int
    facts: Facts | None = None
    """Measured by the session: seconds, and examples whose frozen prefix was not computed again."""


class TrainOptions(TypedDict, total=False):
    """What a method may decide about one call of `Session.train`."""

    gradient_term: GradientTerm | None
    """Added to the gradient of each tensor."""
    frozen: Callable[[str], bool] | None
    """Tensors, by name, that get no gradient and do not change."""
    mask: Tensors | None
    """By tensor name, booleans that broadcast to its shape; where False the value keeps its bits."""
    batches: Sequence[Sequence[int]] | None
    """Positions of training examples, batch by batch, for one epoch, in this order in every epoch; the session's own
    batches when absent."""
    local: LocalSpec | None
    """Replaces the job's `local`."""
    stream: str
    """Distinguishes the random numbers of several trainings of one task."""


class ClientSession(Protocol):
    """What every session knows of its client."""

    @property
    def client(self) -> ClientProfile:
        """Who this client is."""

    @property
    def round(self) -> int:
        """Round of the task, 1-based; 0 while the job is prepared."""

    @property
    def seed(self) -> int:
        """Of the task; the same task has the same one wherever and whenever it runs."""

    @property
    def num_examples(self) -> int:
        """Training examples of this client."""

    @property
    def local(self) -> LocalSpec:
        """The job's `local`."""

    @property
    def private(self) -> MutableMapping[str, Json]:
        """Kept on this client between tasks, committed atomically with the task's result; never sent."""

    @property
    def private_tensors(self) -> MutableMapping[str, Tensors]:
        """Named groups of tensors, kept as `private` is, in the same step; never sent."""


class Session(ClientSession, Protocol):
    """One client's adapter on the shared base model, for the length of one task."""

    # ---- tensors ----
    def select(self, part: Part) -> None:
        """Speak of the job's adapter (at first), or of the whole model: `tensors`, `load` and `train` follow.

        While the whole model is selected its adapter adds nothing. Names are then the model's own.
        """

    def tensors(self) -> Tensors:
        """The selected trainable tensors as they are now; a copy."""

    def load(self, tensors: Tensors) -> None:
        """Overwrite selected tensors by name; raises Refused for an unknown name, wrong shape or dtype."""

    @property
    def scaling(self) -> float:
        """The s in y = W x + s B A x: the job's lora.alpha / lora.rank, the same at every rank."""

    def set_rank(self, rank: int) -> None:
        """Give every LoRA pair this rank, filled with zeros until `load`; `scaling` stays."""

    def base_weights(self) -> Tensors:
        """Pristine base weights under LoRA, d_out x d_in, by module path as PEFT names its factors."""

    def use_base(self, base: Tensors, sha256: str) -> None:
        """Make a whole model, by the model's own names, the base of this task; raises Refused for another hash.

        `sha256` is that of `codec.tensors_sha256`. A process that stands on it already does nothing. Heads that the
        adapter holds are passed over.
        """

    def set_base_delta(self, factors: Tensors) -> None:
        """Make the base W + s B A, from factors of any rank named as PEFT does; none: W, which is pristine or stood on.

        It replaces an earlier shift and never adds to it. Modules not named stay as they are.
        """

    # ---- training ----
    def train(self, **options: Unpack[TrainOptions]) -> LocalResult:
        """Tune the selected tensors on local data from their present values, with a fresh optimizer.

        Everything random comes from the task's seed and the option `stream`.
        """

    # ---- looking at data and model (nothing moves, no generator advances) ----
    def labels(self) -> Array:
        """Class of each training example, int64 (num_examples,); zeros where examples have no class."""

    def difficulty(self, kind: Difficulty) -> Array:
        """How hard each training example is, float64 (num_examples,), at the selected tensors' present values.

        fisher: squared norm of the gradient of log p(y|x) over the LoRA factors; loss: -log p(y|x);
        length: tokens; rarity: sum of -log frequency of its tokens in this client's data; rarity-mean: their mean.
        """

    def fisher(self, examples: Sequence[int]) -> Tensors:
        """Mean over these examples of the squared per-example gradient, float32, of every LoRA factor."""

    def importance(self) -> Mapping[str, Any]:
        """Share of Fisher information of each number of the selected tensors, in [0, 1], for a gradient term.

        The mean squared per-example gradient over some of the client's examples, divided by the largest one; of the
        session's own array kind, by tensor name.
        """

    def sensitivity(
        self, *, noise: float, draws: int, probes: int, variant: Sensitivity, direction: Direction = "random"
    ) -> Array:
        """How much each block's output moves when the embeddings do, float64 (blocks,).

        They move at random, or where the loss of the example grows fastest; then one draw is as good as many.
        """

    def lossless_share(self, rule: Literal["slq", "eigengap"]) -> float:
        """Share of curvature directions that must not be lost, in (0, 1], from this client's data."""


class Forward(Protocol):
    """One batch on its way through a client's models; values are of the session's own array kind.

    Combine them with operators (+, *, @, .T) and the functions here, which all return scalars or
    (batch, ...) arrays that a gradient flows through.
    """

    @property
    def labels(self) -> Any:  # noqa: ANN401 - the session's own array kind
        """Class indices (batch,)."""

    def features(self, model: str = "own") -> Any:  # noqa: ANN401
        """What the trunk of a model sees in the batch, (batch, d_f)."""

    def logits(self, model: str = "own") -> Any:  # noqa: ANN401
        """What the head of a model answers, (batch, classes)."""

    def representation(self, model: str = "own") -> Any:  # noqa: ANN401
        """Input of a model's last layer, (batch, d)."""

    def adapted(self, prefix: str, model: str = "own") -> Any:  # noqa: ANN401
        """What the head answers when layers in slots add B A x, by the pairs loaded as "<prefix><slot>.lora_A"."""

    def tensor(self, name: str) -> Any:  # noqa: ANN401
        """A tensor that `PersonalSession.load` brought under this name."""

    def pad(self, features: Any, width: int) -> Any:  # noqa: ANN401
        """Append zeros to the last axis up to `width`."""

    def cross_entropy(self, logits: Any, labels: Any = None) -> Any:  # noqa: ANN401
        """Mean cross-entropy against the labels."""

    def kl(self, student: Any, teacher: Any, temperature: float = 1.0) -> Any:  # noqa: ANN401
        """Mean KL(teacher || student) of two sets of logits; the teacher gets no gradient."""

    def mse(self, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Mean squared difference."""

    def softmax(self, logits: Any) -> Any:  # noqa: ANN401
        """Probabilities over the last axis."""

    def distances(self, values: Any, points: Any) -> Any:  # noqa: ANN401
        """Squared distance of every value (batch, d) from every point (classes, d), (batch, classes)."""

    def of_label(self, table: Any) -> Any:  # noqa: ANN401
        """The line of a table (classes, ...) that belongs to each example's label, (batch, ...)."""

    def constant(self, value: Any) -> Any:  # noqa: ANN401
        """An array, or a value of this forward, without gradient."""


Objective: TypeAlias = Callable[[Forward], Any]
"""One batch -> the scalar to minimize."""


class PersonalSession(ClientSession, Protocol):
    """One client's own model, which never leaves it, and the small tensors that it shares.

    The own model lives in `private_tensors` between tasks; the session loads and keeps it. Its tensors, and
    whatever else a method brings under such a name, are called "own.<name>" and stay here; tensors that
    travel have names of the method's choice.
    """

    @property
    def classes(self) -> int:
        """Number of labels of the task."""

    def width(self, place: Layer, model: str = "own") -> int:
        """Width of one of this client's models there."""

    def widest(self, place: Layer) -> int:
        """Largest width there over the own models of the job."""

    def slots(self, count: int) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of the query and value layers in the own model's last `count` attention blocks, by slot.

        Slots have the same names in models of any depth: "0.query" is the lowest of the chosen blocks. Raises
        BadInput for a model that has not so many.
        """

    def add_model(self, role: str, name: str) -> None:
        """Build a second model by name (for example a small shared one); its tensors are "<role>.<name>"."""

    def last_layer(self, model: str = "own") -> Mapping[str, str]:
        """The tensors of a model's last layer, "weight" (classes, d) and where there is one "bias", by full name."""

    def tensors(self, prefix: str = "") -> Tensors:
        """Copies of tensors whose names begin so: of models, and of what was loaded beside them."""

    def load(self, tensors: Tensors) -> None:
        """Overwrite tensors of models by name, and bring others beside them; raises Refused for a wrong shape."""

    def train(
        self,
        objective: Objective,
        *,
        moving: Callable[[str], bool],
        local: LocalSpec | None = None,
        gradient_term: GradientTerm | None = None,
        stream: str = "",
    ) -> LocalResult:
        """Minimize the objective over the tensors whose names satisfy `moving`; all others are frozen.

        The tensors of the result are empty: ask `tensors` for those that travel. `stream` tells two trainings
        of one task apart.
        """

    def mean_by_class(self, values: Callable[[Forward], Any]) -> tuple[Array, Array]:
        """Mean of a (batch, d) value over the training examples of each class, (classes, d), and their counts."""

    def predict_with(self, probabilities: Callable[[Forward], Any]) -> None:
        """Score this client from now on by these probabilities (batch, classes) instead of its own model's."""


def positions(groups: Iterable[Iterable[int]]) -> list[list[int]]:
    """Batches of positions as plain lists, for `Session.train`."""
    return [[int(position) for position in group] for group in groups]
