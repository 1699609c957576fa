"""How clients' LoRA updates become one: a registry of rules, apart from the methods that use them.

Every module's update is s B A. FedAvg wants mean(s B A); the mean of the factors is something else, and
every rule pays for the difference in its own coin: error, a frozen factor, an SVD, or a base that moves.
`of(job)` gives a job's aggregation as one value with the server verbs of a method; `install` and
`answer` are its client half. See docs/explanation/aggregation.md.
"""

from lorabbit.aggregation.exchange import FROZEN, answer, config_of, frozen, install, is_a, prefix, rank_of, scaling_of
from lorabbit.aggregation.folding import Aggregation, check, of, one_rank, refuse_choice, refuse_pruning
from lorabbit.aggregation.late import Carried, CarriedProducts, Carry
from lorabbit.aggregation.pruning import PRUNED_TO, pruning
from lorabbit.aggregation.received import Received
from lorabbit.aggregation.rules import COMPONENTS, RULES, Rule, Target, fresh, revived

__all__ = [
    "COMPONENTS",
    "FROZEN",
    "PRUNED_TO",
    "RULES",
    "Aggregation",
    "Carried",
    "CarriedProducts",
    "Carry",
    "Received",
    "Rule",
    "Target",
    "answer",
    "check",
    "config_of",
    "fresh",
    "frozen",
    "install",
    "is_a",
    "of",
    "one_rank",
    "prefix",
    "pruning",
    "rank_of",
    "refuse_choice",
    "refuse_pruning",
    "revived",
    "scaling_of",
]
