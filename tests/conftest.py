"""Shared pieces: a tiny random Llama, random samples, and where `../shared` is (tests that need it skip without)."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what runs here and what runs in a child are compared bit for bit
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "FITOUT_HOME" not in os.environ:  # no test writes into the user's own
    os.environ["FITOUT_HOME"] = tempfile.mkdtemp(prefix="fitout-home-")
    atexit.register(shutil.rmtree, os.environ["FITOUT_HOME"], ignore_errors=True)

import numpy as np
import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def speeds_are_remembered():
    """Whatever else the machine does: measuring it anew for every plan would take longer than the tests."""
    from fitout.plan import machine

    machine.BUSY = float("inf")


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs ../shared")
    return SHARED


def tiny_llama(*, seed: int = 0, vocab: int = 97, packed: bool = True, tied: bool = False, dropout: float = 0.0):
    """A random Llama of two layers with grouped key/value heads, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.model.attention import NAME, register

    register()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        attn_implementation=NAME if packed else "sdpa",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def random_samples(count: int, *, seed: int = 0, vocab: int = 97, low: int = 5, high: int = 40, prefix: int = 0):
    """`count` samples of random ids (the first `prefix` of them common), with a random tail trained."""
    rng = np.random.default_rng(seed)
    common = rng.integers(1, vocab, prefix)
    ids, train_on = [], []
    for _ in range(count):
        own = rng.integers(1, vocab, int(rng.integers(low, high)))
        ids.append(np.concatenate([common, own]).astype(np.int32))
        start = int(rng.integers(0, len(ids[-1]) - 2))
        train_on.append((np.arange(len(ids[-1])) >= start).astype(np.uint8))
    return ids, train_on
