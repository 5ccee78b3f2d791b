"""Simple preference optimisation (Meng et al., arXiv 2405.14734, eq. 6): the reward is an answer's mean
log-probability, and the chosen one's is to be greater by a margin. No reference model.

    loss = -log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - gamma)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import SimpoSettings
from .preference import Preference


class Simpo(Preference):
    def __init__(self, beta: float, gamma: float):
        super().__init__()
        self.beta, self.gamma = beta, gamma

    def judge(self, log_probs: Tensor, tokens: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        rewards = self.beta * log_probs / tokens
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - self.gamma), rewards


def create(settings: SimpoSettings) -> Simpo:
    return Simpo(settings.beta, settings.gamma)
