"""Differential privacy: of clients, by noise on the server's mean, or of examples, by noise in each client's steps.

See docs/explanation/privacy.md for what each promises, to whom, and what it leaves open.
"""

from lorabbit.privacy.accounting import Sampled, epsilon_of, epsilon_of_rounds, epsilon_of_steps
from lorabbit.privacy.choice import check
from lorabbit.privacy.mechanism import protect, spending
from lorabbit.privacy.noise import normal

__all__ = ["Sampled", "check", "epsilon_of", "epsilon_of_rounds", "epsilon_of_steps", "normal", "protect", "spending"]
