"""Which script a text is in, cheaply."""

from __future__ import annotations

import re

LETTER = re.compile(r"[^\W\d_]")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
MOSTLY_CJK = 0.3  # of the letters; Chinese text with code or names in it stays above, English with a name below


def mostly_cjk(text: str) -> bool:
    """Whether a text is mostly Chinese, Japanese or Korean."""
    if text.isascii():
        return False
    found = len(CJK.findall(text))
    return found > 0 and found >= MOSTLY_CJK * len(LETTER.findall(text))
