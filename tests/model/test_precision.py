"""With how many threads a model is computed."""

from __future__ import annotations

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
