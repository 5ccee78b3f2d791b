"""The errors a user can meet, as one family.

    FitoutError                 exit 1   the work failed
    +-- RequestError            exit 2   the request was wrong: a file, a recipe, a flag
    |   +-- RecipeError                  the recipe, every fault at once
    |   +-- DataError                    a data file as a whole (single bad rows go to quarantine)
    |   +-- TemplateError                a chat template that would train the wrong thing
    |   +-- ModelError                   a base model or adapter that cannot be used
    |   +-- RunExistsError               a run directory that is taken
    +-- TemplateLimitError      exit 2   a chat template that does not end, or wants all memory
    +-- CheckError              exit 1   a self-check refused to go on (a merge that changes logits, say)
    +-- Stopped                 exit 3   stopped on request, with a checkpoint

Every one says the cause (`message`), the harm it would have done (`harm`) and what to change (`hint`).
"""

from __future__ import annotations

from typing import Any


class FitoutError(Exception):
    """An error with a cause, the harm and a remedy; `where` names the file, line or key it is about."""

    exit_code = 1

    def __init__(self, message: str, *, harm: str = "", hint: str = "", where: str = ""):
        super().__init__(message)
        self.message = message
        self.harm = harm
        self.hint = hint
        self.where = where

    def lines(self) -> list[str]:
        """At most three short lines: cause, harm, what to change."""
        first = f"{self.where}: {self.message}" if self.where else self.message
        return [line for line in (first, self.harm, self.hint) if line]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys whose values differ, the first five with both values, for a message; "" where none does."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys[:5])


class RequestError(FitoutError):
    exit_code = 2


class RecipeError(RequestError):
    """All faults of a recipe together; `faults` holds one line each."""

    def __init__(self, faults: list[str], *, where: str = ""):
        count = f"{len(faults)} mistake{'s' if len(faults) != 1 else ''} in the recipe"
        super().__init__(count + ":\n" + "\n".join(f"  - {fault}" for fault in faults), where=where)
        self.faults = faults


class DataError(RequestError):
    pass


class TemplateError(RequestError):
    pass


class ModelError(RequestError):
    pass


class RunExistsError(RequestError):
    pass


class TemplateLimitError(FitoutError):
    """No TemplateError, so that nobody takes it for one row's fault and goes on with the next; `place` is the row's."""

    exit_code = 2
    place = 0


class CheckError(FitoutError):
    pass


class Stopped(FitoutError):
    exit_code = 3
