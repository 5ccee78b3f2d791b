"""The code of our own for a CPU, compiled as for a processor that has AVX2 and nothing more."""

from __future__ import annotations

import shutil

import pytest

from fitout.model import blocks, native
from fitout.model.precision import instructions


def forget():
    for known in (native.why_not, native._library, blocks.why_not, blocks._library):
        known.cache_clear()


@pytest.fixture
def compiler():
    if not shutil.which("g++") or "avx2" not in instructions():
        pytest.skip("needs g++ and a processor with AVX2")


@pytest.fixture
def avx2(compiler, monkeypatch):
    flags = [flag for flag in native.FLAGS if flag != "-march=native"]
    monkeypatch.setattr(native, "FLAGS", (*flags, "-mavx2", "-mfma"))
    forget()
    assert native.why_not() is None
    yield
    forget()
