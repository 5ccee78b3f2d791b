"""Personal data in a text: e-mail addresses, telephone numbers, and numbers whose check digits are right.

A run of digits is only taken for a card, an account or an identity number when its check digits and its form agree
(python-stdnum), for a telephone number when a numbering plan has it (phonenumbers): most runs of digits are neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from . import PersonalSettings

Span = tuple[int, int, str]  # from, to, kind

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24}(?![\w-])")
DIGITS = re.compile(r"\d(?:[ \-().]{0,2}\d){5,}")  # without seven digits there is nothing to look for
CARD = re.compile(r"(?<![\d.,])\d(?:[ -]?\d){12,18}(?![\d]|[.,]\d)")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
INTERNATIONAL = re.compile(r"(?<![\w+])\+\d(?:[ \-().]{0,2}\d){6,14}(?!\d)")
LOCAL = re.compile(r"(?<![\w.,+/<*=-])\(?\d(?:[ \-().]{0,2}\d){6,14}(?![\w/]| ?[=*+]|[.,-]\d)")
ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14,17}"
)

#: Identity numbers with check digits, in the form in which people write them: module of stdnum, pattern.
IDENTITY = (
    ("stdnum.cn.ric", re.compile(r"(?<!\d)\d{17}[\dXx](?!\w)")),
    ("stdnum.it.codicefiscale", re.compile(r"(?<!\w)[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z](?!\w)")),
    ("stdnum.es.dni", re.compile(r"(?<!\w)\d{8}-?[A-Z](?!\w)")),
    ("stdnum.fr.nir", re.compile(r"(?<!\d)[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d(?!\d)")),
    ("stdnum.br.cpf", re.compile(r"(?<!\d)\d{3}\.\d{3}\.\d{3}-\d\d(?!\d)")),
    ("stdnum.kr.rrn", re.compile(r"(?<!\d)\d{6}-[1-8]\d{6}(?!\d)")),
    ("stdnum.us.ssn", re.compile(r"(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])")),
    ("stdnum.in_.aadhaar", re.compile(r"(?<!\d)[2-9]\d{3} \d{4} \d{4}(?![ \d])")),
)


def find(text: str, settings: PersonalSettings) -> list[Span]:
    """The personal data of the wanted kinds, in order, without overlaps."""
    spans: list[Span] = []
    kinds = settings.kinds
    if "email" in kinds and "@" in text:
        spans += [(found.start(), found.end(), "email") for found in EMAIL.finditer(text)]
    if DIGITS.search(text) or ("id" in kinds and re.search(r"[A-Z]{6}\d\d[A-Z]", text)):
        if "iban" in kinds:
            spans += _checked(IBAN, text, "iban", _valid("stdnum.iban"))
        if "id" in kinds:
            for module, pattern in IDENTITY:
                spans += _checked(pattern, text, "id", _valid(module))
        if "card" in kinds:
            spans += _checked(CARD, text, "card", _is_card)
        if "phone" in kinds:
            spans += _phones(text, settings.regions)
    taken: list[Span] = []
    for span in spans:  # in the order of how certain the kinds are
        if all(span[1] <= start or span[0] >= end for start, end, _ in taken):
            taken.append(span)
    return sorted(taken)


def masked(text: str, spans: Sequence[Span]) -> str:
    """The text with [EMAIL], [PHONE], ... in place of what was found."""
    pieces, at = [], 0
    for start, end, kind in spans:
        pieces += [text[at:start], f"[{kind.upper()}]"]
        at = end
    return "".join((*pieces, text[at:]))


def veiled(text: str, spans: Sequence[Span]) -> str:
    """The text with all but the first character of what was found as dots: what a report may show."""
    pieces, at = [], 0
    for start, end, _ in spans:
        pieces += [text[at:start], text[start] + re.sub(r"\w", "•", text[start + 1 : end])]
        at = end
    return "".join((*pieces, text[at:]))


def _checked(pattern: re.Pattern[str], text: str, kind: str, valid: Callable[[str], bool]) -> list[Span]:
    return [(found.start(), found.end(), kind) for found in pattern.finditer(text) if valid(found[0])]


@cache
def _valid(module: str) -> Callable[[str], bool]:
    plug: Any = import_module(module)
    return plug.is_valid


def _is_card(number: str) -> bool:
    digits = re.sub(r"[ -]", "", number)
    return ISSUERS.fullmatch(digits) is not None and _valid("stdnum.luhn")(digits)


def _phones(text: str, regions: Sequence[str]) -> list[Span]:
    """International numbers, and those of the given countries without their prefix."""
    import phonenumbers

    def valid(number: str, region: str | None) -> bool:
        try:
            return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
        except phonenumbers.NumberParseException:
            return False

    spans = _checked(INTERNATIONAL, text, "phone", lambda number: valid(number, None)) if "+" in text else []
    for region in regions:
        for found in LOCAL.finditer(text):
            if _written_as_one(found[0], region) and valid(found[0], region):
                spans.append((found.start(), found.end(), "phone"))
    return spans


def _written_as_one(number: str, region: str) -> bool:
    """Whether people write a telephone number so: with a leading zero, in groups, or as a Chinese mobile number. A bare
    run of digits is mostly something else."""
    grouped = number[0] in "0(" or len(re.findall(r"\d+", number)) > 2
    return grouped or (region == "CN" and re.fullmatch(r"1[3-9]\d{9}", number) is not None)
