"""Full fine-tuning: every weight that is not frozen is trained, and all are saved as a plain Hugging Face folder."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import RequestError
from . import FullSettings
from .base import Method, decoder_layers


class Full(Method):
    frozen_base = False

    def __init__(self, settings: FullSettings):
        self.settings = settings

    def apply(self, model: Any) -> None:
        names = _names(model)
        frozen = self._matched(names) | self._early(model, names)
        for parameter in model.parameters():
            parameter.requires_grad_(not any(name in frozen for name in names[id(parameter)]))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RequestError(
                "method.freeze leaves nothing to train", harm="The run would end where it began.", hint="Freeze less."
            )
        _require_new_rows(model)

    def _matched(self, names: dict[int, list[str]]) -> set[str]:
        """Parameters that a pattern of `freeze` names, by themselves or by a module around them."""
        known = [name for group in names.values() for name in group]
        frozen: set[str] = set()
        for pattern in self.settings.freeze:
            matched = {n for n in known if fnmatchcase(n, pattern) or fnmatchcase(n, pattern + ".*")}
            if not matched:
                near = _near(pattern, known)
                raise RequestError(
                    f"method.freeze: {pattern!r} names no parameter of this model",
                    harm="What it means would silently be trained.",
                    hint=f"Near it: {', '.join(near)}" if near else f"Names look like {known[0]}, {known[-1]}",
                )
            frozen |= matched
        for group in names.values():
            fixed, free = [n for n in group if n in frozen], [n for n in group if n not in frozen]
            if fixed and free:
                raise RequestError(
                    f"method.freeze names {fixed[0]}, which is one tensor with {free[0]} (tied)",
                    harm="It cannot be fixed by one name and trained by the other.",
                    hint=f"Add {free[0]} to freeze, or take {fixed[0]} out.",
                )
        return frozen

    def _early(self, model: Any, names: dict[int, list[str]]) -> set[str]:
        """Parameters before the last `last_layers` decoder layers, by the order in which modules stand in the model."""
        last = self.settings.last_layers
        if last is None:
            return set()
        path, layers = decoder_layers(model)
        if last > len(layers):
            raise RequestError(
                f"method.last_layers is {last}, and the model has {len(layers)} decoder layers",
                hint="Lower it, or leave it out to train every weight.",
            )
        first = next(layers[-last].parameters())
        early: set[str] = set()
        for parameter in model.parameters():
            if parameter is first:
                return early
            early.update(names[id(parameter)])
        raise AssertionError(f"{path} is not among the parameters")

    def save(self, model: nn.Module, folder: Path, *, base: str, revision: str | None = None) -> None:
        from ..load import save_model

        save_model(model, folder)

    def merge(self, model: nn.Module) -> None:
        """Nothing to fold in: the weights are the model."""


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its identity; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _near(pattern: str, known: list[str]) -> list[str]:
    """Up to three parameters whose name is like the pattern."""
    plain = pattern.strip("*.")
    holding = [name for name in known if plain and plain in name]
    return holding[:3] or difflib.get_close_matches(plain, known, 3, cutoff=0.4)


def _require_new_rows(model: Any) -> None:
    """Tokens added to the vocabulary mean nothing until their embeddings are trained."""
    from ..load import embeddings

    grown = getattr(model, "fitout_grown_vocabulary", False)
    fixed = [name for name, module in embeddings(model).items() if not module.weight.requires_grad]
    if grown and fixed:
        raise RequestError(
            f"{fixed[0]} would stay fixed, and the chat template added tokens to it",
            where="method",
            harm="The new tokens would keep the mean of all others and mean nothing.",
            hint="Leave it out of freeze (and last_layers), or take chat.template: plain, which adds no tokens.",
        )


def create(settings: FullSettings) -> Full:
    return Full(settings)
