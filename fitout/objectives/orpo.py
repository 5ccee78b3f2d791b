"""Odds ratio preference optimisation (Hong et al., arXiv 2403.07691): the chosen answer is learned, and its odds are
raised over the rejected one's. No reference model.

    loss = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)),   odds = p / (1 - p)

with log p the mean over an answer's tokens (eqs. 3 to 7). Both terms are averaged over pairs; the NLL is of the answer
alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import OrpoSettings
from .preference import Preference

SURE = -1e-7  # the greatest log p whose odds are told apart from infinite ones


class Orpo(Preference):
    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def judge(self, log_probs: Tensor, tokens: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        mean = log_probs / tokens
        chosen, rejected = _log_odds(mean).unbind(1)
        return -mean[:, 0] - self.beta * F.logsigmoid(chosen - rejected), self.beta * mean


def _log_odds(log_p: Tensor) -> Tensor:
    log_p = log_p.clamp(max=SURE)
    return log_p - torch.log(-torch.expm1(log_p))


def create(settings: OrpoSettings) -> Orpo:
    return Orpo(settings.beta)
