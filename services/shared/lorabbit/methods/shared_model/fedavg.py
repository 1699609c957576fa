"""FedAvg over whatever is trainable: full fine-tuning, LoRA (FedIT), BitFit, adapters, heads.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), Algorithm 1. With LoRA it is FedIT (Zhang et al., 2023, arXiv
2305.05644): the factors A and B are averaged separately.

    (1)  w_k     = local steps of the job's optimizer on F_k, from w^t
    (2)  w^{t+1} = sum_k (n_k / n) w_k,   n = sum of n_k over the cohort

The job's `aggregation` replaces (2) for LoRA factors: see `lorabbit.aggregation`.
"""

from __future__ import annotations

from typing import ClassVar

from lorabbit.methods.api.averaging import Averaging


class FedAvg(Averaging):
    """Average the clients' tensors, weighted by their number of training examples: (1) and (2) and nothing else."""

    name: ClassVar[str] = "fedavg"
    summary: ClassVar[str] = "weighted average of what is trained: LoRA (FedIT), full, BitFit, adapter or head"
    paper: ClassVar[str] = "McMahan et al., Communication-Efficient Learning of Deep Networks, 2017, arXiv 1602.05629"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum", "buffered"})
