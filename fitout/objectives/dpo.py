"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7): the reward is by how much an answer has
become more likely than it was as training began.

    loss = -log sigmoid(reward(chosen) - reward(rejected)),   reward = beta * (log p - log p as training began)

with log p summed over an answer's tokens. The model as training began is the reference: its log-probabilities are
computed once, before the first step (train/references.py), so no second model is held and no second forward made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import DpoSettings
from .preference import Preference


class Dpo(Preference):
    refers = True

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def judge(self, log_probs: Tensor, tokens: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        began_with = torch.where(references.isnan(), log_probs.detach(), references)
        rewards = self.beta * (log_probs - began_with)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def create(settings: DpoSettings) -> Dpo:
    return Dpo(settings.beta)
