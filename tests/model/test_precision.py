"""With how many threads a model is computed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fitout.model import precision

CPU = torch.device("cpu")


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(precision, "_threads", [])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_narrow_models_have_one_thread_and_wide_ones_all_again(three_threads):
    assert precision.use_threads(192, CPU).startswith("one thread of 3: a model 192 wide")
    assert torch.get_num_threads() == 1
    assert precision.use_threads(192, CPU) is not None and torch.get_num_threads() == 1
    assert precision.use_threads(512, CPU) is None and torch.get_num_threads() == 3


def test_the_user_and_a_gpu_overrule(three_threads, monkeypatch):
    assert precision.use_threads(192, torch.device("cuda")) is None and torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert precision.use_threads(192, CPU) is None and torch.get_num_threads() == 3


@pytest.fixture
def amd(monkeypatch):
    """A processor that MKL drives at half its speed, whatever this one is."""
    if precision.has_amx():
        pytest.skip("oneDNN rounds here")
    monkeypatch.setattr(precision, "instructions", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(precision, "processor_says", lambda _: "AuthenticAMD")


def test_onednn_multiplies_only_while_a_training_computes(amd):
    assert not precision.onednn_multiplies()
    with pytest.raises(ValueError, match="stop"), precision.faster_products(CPU):
        assert precision.onednn_multiplies()
        with precision.faster_products(CPU):
            assert precision.onednn_multiplies()
        assert precision.onednn_multiplies()
        a, b = torch.randn(2, 300, 200), torch.randn(2, 200, 100)
        exact = a.double() @ b.double()
        assert float((a @ b - exact).abs().max() / exact.abs().max()) < 2e-6
        raise ValueError("stop")
    assert not precision.onednn_multiplies()


@pytest.mark.skipif(
    precision.has_amx() or "avx512f" not in precision.instructions(),
    reason="oneDNN rounds here, or PyTorch gives it no fp32",
)
def test_onednn_keeps_no_kernel_for_each_document():
    """Scores by PyTorch's kernels are products of another size for each document. Counted by what oneDNN says that it
    makes."""
    script = """
import torch
from fitout.layout import Segment
from fitout.model import attention, native, precision
precision.instructions = lambda: frozenset({"avx512f"})
precision.processor_says = lambda _: "AuthenticAMD"
native.serves = lambda *_: False
def one(length, **how):
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    out = attention.packed_attention(None, q, k, v, None, segments=(Segment(0, length),), **how)[0]
    out.backward(torch.ones_like(out))
with precision.faster_products(torch.device("cpu")):
    assert precision.onednn_multiplies()
    for how in ({}, {"sliding_window": 20}, {"softcap": 2.0}, {"dropout": 0.1}, {"s_aux": torch.zeros(2)}):
        for length in (50, 51, 77):
            one(length, **how)
        assert precision.onednn_multiplies()
"""
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ONEDNN_VERBOSE": "profile_create"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    made = [line for line in told.stdout.splitlines() if "create:cache_miss" in line and ",matmul," in line]
    assert [line.rsplit(",", 2)[1] for line in made] == ["128x128:128x128"]  # by which it is tried


def test_onednn_keeps_few_kernels():
    """Its cache and PyTorch's above it keep 1,024 each, 0.55 MB a product's size: 110 MB for what is counted here."""
    script = """
import torch
from fitout.model import precision
from fitout.plan.machine import resident
x, weight = torch.randn(600, 64).bfloat16(), torch.randn(64, 64).bfloat16()
def compute(lengths):
    for length in lengths:
        x[:length] @ weight
with torch.no_grad():
    compute(range(1, 200))
    before = resident()
    compute(range(200, 400))
    print("grown", (resident() - before) / 2**20)
    compute([399, 399 - precision.KERNELS + 1, 10])
"""
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ONEDNN_VERBOSE": "profile_create"}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    at = next(index for index, line in enumerate(told) if line.startswith("grown"))
    made = [line.rsplit(",", 2)[1].split("x")[0] for line in told[at:] if "create:cache_miss" in line]
    if not any("create:cache_miss" in line for line in told[:at]):
        pytest.skip("oneDNN does not multiply bf16 on this processor")
    assert made == ["10"] and float(told[at].split()[1]) < 15


def test_products_that_are_rounded_are_not_taken(amd, monkeypatch):
    monkeypatch.setattr(precision, "EXACT", 1e-9)  # no product in fp32 is that near
    with precision.faster_products(CPU):
        assert not precision.onednn_multiplies()


@pytest.mark.parametrize(
    ("flags", "maker", "device"),
    [
        ({"avx512f"}, "GenuineIntel", "cpu"), ({"avx2"}, "AuthenticAMD", "cpu"),
        ({"avx512f", "amx_bf16"}, "AuthenticAMD", "cpu"), ({"avx512f"}, "AuthenticAMD", "cuda"),
    ],
)  # fmt: skip
def test_other_processors_keep_what_pytorch_chose(flags, maker, device, monkeypatch):
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(flags))
    monkeypatch.setattr(precision, "processor_says", lambda _: maker)
    with precision.faster_products(torch.device(device)):
        assert not precision.onednn_multiplies()
