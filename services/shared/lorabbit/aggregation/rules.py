"""The rules: one module's factors of all clients in, the next factors and a shift of the base out.

With n = sum n_k and p_k = n_k / n, for one module (A: r x d_in, B: d_out x r, update s B A):

    factors      A = sum p_k A_k,  B = sum p_k B_k                        (FedIT, arXiv 2305.05644)
    freeze-a     A never moves,    B = sum p_k B_k                        (FFA-LoRA, arXiv 2403.12313)
    zero-padded  as factors, filled with zeros to the largest rank,
                 with p_k = ||B_k A_k||_F / sum of them                   (HetLoRA, arXiv 2401.06432)
    svd          s B A = the best rank-r approximation of sum p_k s_k B_k A_k   (FlexLoRA, arXiv 2402.11505)
    stack        W += sum p_k s_k B_k A_k, and A, B start afresh          (FLoRA, arXiv 2409.05976)
    exact        as factors, and W += sum p_k s_k B_k A_k - s B A         (FedEx-LoRA, arXiv 2410.09432)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lorabbit.errors import Refused
from lorabbit.job.spec import Aggregation as RuleName
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.tensors.lora_math import Factors

Weighted = Sequence[tuple[float, Factors]]
"""Factors of one module by client, with weights that need not sum to one."""


@dataclass(frozen=True, slots=True)
class FactorShape:
    """What the next factors of one module must look like."""

    rank: int
    scaling: float
    seed: int = 0
    """Of fresh factors."""
    kept: Factors | None = None
    """The server's present factors, for a rule that keeps what nobody trained."""


@dataclass(frozen=True, slots=True)
class Folded:
    """One module after a round."""

    factors: Factors
    shift: Factors | None = None
    """What is added to the base weight."""

    def product(self) -> Factors:
        """The whole update that the server now holds, as factors."""
        return self.factors if self.shift is None else lora_math.stack([(1.0, self.factors), (1.0, self.shift)])


DEAD = 1e-6
"""A row of A that is smaller than the largest by this factor holds rounding errors."""
Fold = Callable[[Weighted, FactorShape], Folded]


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to fold, and what it can bear."""

    name: RuleName
    fold: Fold
    unequal: str = ""
    """Why clients of unlike ranks are refused; empty where they are not."""
    late: str = ""
    """Why updates that started from an older version are refused; empty where they are not."""
    late_by_products: bool = False
    """Such updates are carried over by their products, since factors of two versions do not compare."""
    shifts_base: bool = False
    freezes_a: bool = False
    by_norm: bool = False
    """Clients count by the norm of their update and not by their examples."""


def mean_of_factors(weighted: Weighted, target: FactorShape) -> Folded:
    """Average A and B apart, in the bits of `tensors.weighted_mean`."""
    first = weighted[0][1]
    for _, factors in weighted:
        if factors.rank != first.rank:
            raise Refused("rank", f"factors of rank {factors.rank} and {first.rank} have no mean")
        if factors.scaling != target.scaling:
            raise Refused("scaling", f"factors with scaling {factors.scaling} have no mean with {target.scaling}")
    mean = weighted_mean((weight, {"a": f.a, "b": f.b}) for weight, f in weighted)
    return Folded(Factors(mean["a"], mean["b"], target.scaling))


def mean_of_padded(weighted: Weighted, target: FactorShape) -> Folded:
    """Average A and B apart, every client filled with zeros to the rank of the server."""
    mean = mean_of_factors([(weight, padded(factors, target.rank)) for weight, factors in weighted], target).factors
    return Folded(revived(mean, fresh(mean, target)))


def truncated_mean(weighted: Weighted, target: FactorShape) -> Folded:
    """Average the products exactly and keep the best approximation; its prefixes serve lower ranks."""
    like = weighted[0][1]
    cut = lora_math.truncate(mean_of_products(weighted, target.scaling), target.rank).factors
    kept = Factors(cut.a.astype(like.a.dtype), cut.b.astype(like.b.dtype), target.scaling)
    return Folded(revived(kept, fresh(like, target)))


def into_the_base(weighted: Weighted, target: FactorShape) -> Folded:
    """Average the products exactly, into the base; clients go on from fresh factors."""
    like = weighted[0][1]
    return Folded(fresh(like, target), mean_of_products(weighted, target.scaling))


def mean_and_residual(weighted: Weighted, target: FactorShape) -> Folded:
    """Average A and B apart, and what the product of the means misses goes into the base."""
    mean = mean_of_factors(weighted, target).factors
    residual = lora_math.stack([(1.0, mean_of_products(weighted, target.scaling)), (-1.0, mean)], target.scaling)
    return Folded(mean, residual)


def mean_of_components(weighted: Weighted, target: FactorShape) -> Folded:
    """Average each rank-one component over the clients that trained it; the server's own where nobody did.

    A client of a lower rank trained the first components: it must not dilute the others with zeros.
    Where every client trained every component this is `mean_of_factors`, to the bit.
    """
    kept = target.kept
    if kept is None or all(factors.rank == kept.rank for _, factors in weighted):
        return mean_of_factors(weighted, target)
    a, b = kept.a.copy(), kept.b.copy()
    for component in range(kept.rank):
        trained = [(w, Factors(f.a[[component]], f.b[:, [component]], f.scaling)) for w, f in weighted
                   if f.rank > component]  # fmt: skip
        if sum(weight for weight, _ in trained) > 0:
            mean = mean_of_factors(trained, target).factors
            a[component], b[:, component] = mean.a[0], mean.b[:, 0]
    return Folded(Factors(a, b, target.scaling))


def mean_of_products(weighted: Weighted, scaling: float) -> Factors:
    """Stack to the exact mean product, with weights made to sum to one."""
    return lora_math.stack(normalized(weighted), scaling)


def normalized(weighted: Weighted) -> list[tuple[float, Factors]]:
    """The same with weights that sum to one."""
    total = float(sum(weight for weight, _ in weighted))
    if total <= 0.0:
        raise ValueError("a mean needs at least one client of positive weight")
    return [(weight / total, factors) for weight, factors in weighted]


def padded(factors: Factors, rank: int) -> Factors:
    """Fill with zero components up to a rank; the product stays."""
    missing = rank - factors.rank
    if missing < 0:
        raise Refused("rank", f"factors of rank {factors.rank} came to a server of rank {rank}")
    return Factors(np.pad(factors.a, ((0, missing), (0, 0))), np.pad(factors.b, ((0, 0), (0, missing))),
                   factors.scaling)  # fmt: skip


def fresh(like: Factors, target: FactorShape) -> Factors:
    """Factors as PEFT draws them: A Kaiming-uniform with a = sqrt(5), which is U(-1, 1) / sqrt(d_in); B zero."""
    d_in, d_out = like.a.shape[1], like.b.shape[0]
    drawn = np.random.default_rng(target.seed).uniform(-1.0, 1.0, (target.rank, d_in)) / np.sqrt(d_in)
    return Factors(drawn.astype(like.a.dtype), np.zeros((d_out, target.rank), like.b.dtype), target.scaling)


COMPONENTS = Rule("factors", mean_of_components)
"""The mean of factors where weak clients train the first components only; for methods that order components."""


def revived(factors: Factors, drawn: Factors) -> Factors:
    """Give components that hold nothing a row of A that was drawn, and B = 0: the product stays, and they can learn.

    A round of weak clients alone leaves such components: where A and B are zero, both gradients are too.
    """
    sizes = np.linalg.norm(factors.a.astype(np.float64), axis=1)
    dead = sizes <= DEAD * sizes.max(initial=0.0)
    if not dead.any():
        return factors
    a, b = factors.a.copy(), factors.b.copy()
    a[dead], b[:, dead] = drawn.a[: factors.rank][dead], 0
    return Factors(a, b, factors.scaling)


_SAME_A = "the mean of factors compares them entry by entry, and entries of unlike ranks do not meet"
_ZEROS = "zeros in the place of the components that a client lacks would wipe them out in a small buffer"
_MOVED = "it averages factors entry by entry, and those of an older version stand on another base"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("factors", mean_of_factors, unequal=_SAME_A),
            Rule("freeze-a", mean_of_factors, unequal="all clients share one frozen A", freezes_a=True),
            Rule("zero-padded", mean_of_padded, late=_ZEROS, by_norm=True),
            Rule("svd", truncated_mean, late_by_products=True),
            Rule("stack", into_the_base, late_by_products=True, shifts_base=True),
            Rule("exact", mean_and_residual, unequal=_SAME_A, late=_MOVED, shifts_base=True),
        )
    }
)
