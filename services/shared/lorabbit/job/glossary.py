"""Words of a job that make a baseline without being a method: what is trained, how LoRA is folded, what is hard.

They go with every method whose mathematics allows it, and with `fedavg` they are the methods of their papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CHOICES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "model.trainable": {
            "lora": "low-rank factors beside the weights of some layers (Hu et al., 2021, arXiv 2106.09685)",
            "full": "the whole model",
            "bitfit": "biases and the head (Ben Zaken et al., 2021, arXiv 2106.10199)",
            "adapter": "bottleneck layers in every block (Houlsby et al., 2019, arXiv 1902.00751)",
            "head": "the classifier's head alone",
            "prompt": "PEFT's prompt tuning: tokens before the input (Lester et al., 2021, arXiv 2104.08691)",
            "p-tuning": "PEFT's p-tuning: such tokens out of a small encoder (Liu et al., 2021, arXiv 2103.10385)",
            "prefix": "PEFT's prefix tuning: keys and values in every block, as in P-tuning v2 "
            "(Liu et al., 2021, arXiv 2110.07602)",
        },
        "aggregation": {
            "factors": "FedIT: the means of A and of B (Zhang et al., 2023, arXiv 2305.05644)",
            "freeze-a": "FFA-LoRA: A never moves, and the mean of B is exact (Sun et al., 2024, arXiv 2403.12313)",
            "zero-padded": "HetLoRA: factors of unlike ranks, filled with zeros, weighed by their norm "
            "(Cho et al., 2024, arXiv 2401.06432)",
            "svd": "FlexLoRA: the mean of the products, cut by SVD to each client's rank "
            "(Bai et al., 2024, arXiv 2402.11505)",
            "stack": "FLoRA: stacked factors, into the base; new factors every round "
            "(Wang et al., 2024, arXiv 2409.05976)",
            "exact": "FedEx-LoRA: the means of A and of B, and what they miss into the base "
            "(Singhal et al., 2024, arXiv 2410.09432)",
        },
        "method.difficulty": {
            "fisher": "fibecfed: the squared gradient of log p over the LoRA factors",
            "loss": "-log p of the label",
            "length": "tokens (Platanios et al., 2019, arXiv 1903.09848)",
            "rarity": "the sum of -log(share) of the tokens in the client's data (Platanios et al., 2019)",
            "rarity-mean": "their mean",
            "random": "no order",
        },
    }
)
"""By key of the job file: word -> what it is. The last key is of fibecfed; with gal_ratio 1 its curriculum is all."""
