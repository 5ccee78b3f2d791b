"""What tests of data preparation share: the embedded model's chat, and rows written as JSON lines."""

from __future__ import annotations

import json

import pytest

from fitout.chat.render import open_chat
from fitout.model.load import SHELL


@pytest.fixture(scope="module")
def chat():
    return open_chat(SHELL)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
