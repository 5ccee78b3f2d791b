"""Memory of large tensors that is used again: what stands in it stays, and there is never more than was in use."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
import torch

from fitout.model import blocks
from fitout.model.memory import give_back, is_out_of_memory
from tests.model.conftest import forget

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(compiler):
    assert blocks.why_not() is None
    assert blocks.held()[1] == 0, "a tensor of another test has a block still"


def churn(seed: int, rounds: int = 300) -> None:
    """Tensors of many sizes come and go; each holds its own number throughout."""
    chance, alive = random.Random(seed), []
    for _ in range(rounds):
        tensor = torch.full((chance.randrange(1, 900_000),), chance.random())
        alive.append((tensor, tensor[0].item()))
        if len(alive) > 12:
            tensor, number = alive.pop(chance.randrange(len(alive)))
            assert bool((tensor == number).all())
    assert all(bool((tensor == number).all()) for tensor, number in alive)


def test_what_stands_in_a_tensor_stays_and_no_more_is_held_than_was_in_use():
    with blocks.reused(CPU):
        churn(0)
        held, used, most = blocks.held()
        assert used == 0 < held <= most
    assert blocks.held()[0] == 0


def test_threads():
    failed = []

    def work(seed):
        try:
            churn(seed, 100)
        except AssertionError as error:
            failed.append(error)

    with blocks.reused(CPU):
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed and blocks.held()[1] == 0


def test_a_block_is_used_again_by_what_fits_and_grown_for_a_little_more():
    with blocks.reused(CPU):
        first = torch.ones(600_000)
        place, (size, _, _) = first.data_ptr(), blocks.held()
        del first
        assert torch.empty(500_000).data_ptr() == place and blocks.held()[0] == size  # no other memory
        more = torch.empty(800_000)
        assert int(more[:600_000].sum()) == 600_000  # its pages, moved: what a new block would have cleared
        small = torch.empty(30_000)  # from the heap
        assert blocks.held()[0] == blocks.held()[1] == -(-3_200_000 // 4096) * 4096
        del more, small


def test_tensors_outlive_it():
    with blocks.reused(CPU):
        with blocks.reused(CPU):  # the same one's
            kept, gone = torch.arange(500_000), torch.ones(500_000)
        del gone
        assert blocks.held()[0] > blocks.held()[1]
    assert blocks.held()[0] == blocks.held()[1] > 0
    assert int(kept.sum()) == 500_000 * 499_999 // 2
    del kept
    assert blocks.held()[0] == 0


def test_what_no_machine_has_is_pytorchs_error():
    with blocks.reused(CPU):
        kept = torch.ones(500_000)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 58)
        assert is_out_of_memory(caught.value) and int(kept.sum()) == 500_000
        torch.ones(900_000)
        assert blocks.held()[0] > blocks.held()[1]
        give_back(CPU)  # as a training does then
        assert blocks.held()[0] == blocks.held()[1] > 0
        del kept, caught


def test_another_device_and_no_compiler(monkeypatch, tmp_path):
    with blocks.reused(torch.device("cuda")):
        big = torch.ones(500_000)
        assert blocks.held()[1] == 0
    monkeypatch.setenv("FITOUT_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    forget()
    try:
        assert blocks.why_not() == "there is no C++ compiler (g++)"
        with blocks.reused(CPU):
            assert int(torch.ones(500_000).sum()) == len(big)
    finally:
        forget()


RESIDENT = """
import sys, torch
from fitout.model import blocks
def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))
torch.set_num_threads(1)
before, most = resident(), 0
with blocks.reused(torch.device("cpu")):
    for step in range(60):  # layers that keep tensors of three widths, of as many tokens as the step happens to have
        tokens, kept, size = 1000 + 37 * (step * 7 % 15), [], 0
        for layer in range(8):
            for width in (512, 512, 1376, 512, 1376):
                kept.append(torch.ones(tokens, width))
                torch.ones(tokens, 256)
                size += kept[-1].nbytes
        most = max(most, size)
        top = resident() - before
        print(top, most)
"""


def test_what_is_resident_is_what_is_in_use():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    last, most = map(int, done.stdout.splitlines()[-1].split())
    assert 0 < last < 1.1 * most + (16 << 20)
