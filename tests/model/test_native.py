"""The code of our own for a CPU: what is said where it cannot be had, and that nothing wrong is taken."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from fitout.layout import Segment
from fitout.model import library, native
from fitout.model.attention import packed_attention
from tests.model.conftest import forget


@pytest.fixture(autouse=True)
def anew(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("FITOUT_HOME", str(tmp_path / "home"))
    forget()
    yield
    forget()


def attended():
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    return packed_attention(None, x, x, x, None, segments=(Segment(0, 4), Segment(4, 9)))[0]


def stand_in(tmp_path, text):
    path = tmp_path / "c++"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_pytorch_computes_the_same(monkeypatch, tmp_path):
    right = attended()
    assert native.why_not() is None and len(list((tmp_path / "home" / "native").iterdir())) == 1
    forget()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native.why_not() == "there is no C++ compiler (g++)"
    torch.testing.assert_close(attended(), right)


def test_a_compiler_that_fails_or_hangs(monkeypatch, tmp_path):
    says = "import sys; sys.exit('lanes.h: error: it is too new for me')"
    monkeypatch.setenv("CXX", stand_in(tmp_path, says))
    assert "could not compile it: lanes.h: error: it is too new for me" in native.why_not()
    forget()
    monkeypatch.setattr(library, "PATIENCE", 0.5)
    monkeypatch.setenv("CXX", stand_in(tmp_path, "import time; time.sleep(60)"))
    assert "took more than 0.5 seconds" in native.why_not()
    assert not list((tmp_path / "home" / "native").iterdir())


def test_a_damaged_library_is_not_used_and_compiled_anew(monkeypatch, tmp_path):
    writes = "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('nonsense')"
    monkeypatch.setenv("CXX", stand_in(tmp_path, writes))
    said = native.why_not()
    [path] = (tmp_path / "home" / "native").iterdir()
    assert str(path) in said and attended().isfinite().all()
    forget()
    stand_in(tmp_path, "import os, sys; os.execvp('g++', ['g++', *sys.argv[1:]])")
    assert native.why_not() is None
    assert path.read_bytes()[:4] == b"\x7fELF"


def test_a_folder_that_others_can_write_is_not_loaded_from(tmp_path):
    (tmp_path / "home" / "native").mkdir(parents=True)
    (tmp_path / "home" / "native").chmod(0o777)
    assert native.why_not() == f"others can write into {tmp_path / 'home' / 'native'}"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FITOUT_HOME", str(tmp_path / "file"))
    assert "Not a directory" in native.why_not()


def test_a_compiler_with_options_and_one_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O1")
    assert native.why_not() is None
    forget()
    monkeypatch.setenv("CXX", "some-other-c++ -O1")
    assert native.why_not() == "there is no C++ compiler (some-other-c++)"


@pytest.mark.parametrize("what", ["gated", "gated_slopes", "norm", "norm_slope", "turned", "loss"])
def test_a_function_that_computes_something_else_is_not_used(what, monkeypatch):
    right = getattr(native, what)

    def wrong(*given, **more):
        found = right(*given, **more)
        (found if isinstance(found, torch.Tensor) else found[-1]).view(-1)[3] *= 1.01
        return found

    monkeypatch.setattr(native, what, wrong)
    assert "from what it should be" in native.why_not()


def test_attention_that_is_something_else_is_not_used(monkeypatch):
    right = native.attend

    def wrong(*given):
        out, norm = right(*given)
        out[0, 100, 0, 0] += 0.1
        return out, norm

    monkeypatch.setattr(native, "attend", wrong)
    assert native.why_not() == "its attention in torch.float32 is 4.0e-02 from what it should be"


def test_other_processors_and_systems(monkeypatch):
    monkeypatch.setattr(native, "instructions", lambda: frozenset({"asimd", "bf16"}))
    assert native.why_not() == "it is written for Linux on processors with AVX2"


def test_it_computes_with_the_threads_of_pytorch():
    """A second OpenMP library would have threads of its own, which wait in the others' way."""
    assert native.why_not() is None
    with open("/proc/self/maps") as maps:
        names = {os.path.basename(line.split()[-1]) for line in maps}
    assert len({name for name in names if name.startswith(("libgomp", "libiomp", "libomp"))}) == 1
