"""The step of a training on a CUDA card, without one (step.py): no tensor on the wrong device, nothing that a kernel
would refuse, nothing that the host waits for, and no more launches than there need be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LORA = {"kind": "lora", "rank": 8}
METHODS = [
    LORA,
    {"kind": "lora", "rank": 8, "targets": ["q_proj", "lm_head"]},
    {"kind": "dora", "rank": 8},
    {"kind": "adapter", "style": "houlsby", "reduction": 4},
    {"kind": "sparse", "density": 0.02, "select": "random"},
    {"kind": "full"},
]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the card that is not there is built by g++")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    built, home = tmp_path_factory.mktemp("card") / "card.so", Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{home / 'include'}", HERE / "card.cpp", "-o", built,
         f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"],
        check=True,
    )  # fmt: skip

    def step(**asked):
        asked = {"method": LORA, "dtype": "bfloat16", "share": True, "micro_batches": 2, "fused": True} | asked
        return subprocess.run(
            [sys.executable, "-m", "tests.cuda.step", json.dumps(asked)],
            env={**os.environ, "LD_PRELOAD": str(built), "OMP_NUM_THREADS": "1"}, cwd=HERE.parents[1],
            capture_output=True, text=True,
        )  # fmt: skip

    return step


def seen(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{one['kind']} {len(one)}")
def test_a_step_in_bf16(card, method):
    found = seen(card(method=method))
    assert found["elsewhere"] == [] and found["updated"] == found["trained"] > 0
    assert found["supervised"] == found["expected"]
    assert found["waits"] == 2  # the norm of the gradients and the loss, when all is launched
    below = method["kind"] == "adapter"  # nothing is trained below the lowest one, which stands behind attention
    assert found["of"]["_varlen_attn"] == 2 * found["layers"]
    assert found["of"]["_varlen_attn_backward"] == 2 * (found["layers"] - below)
    assert "_scaled_dot_product_attention" not in str(found["of"]) and "_safe_softmax" not in found["of"]


def test_what_each_micro_batch_costs(card):
    """Nothing is waited for however many there are, two copies go over, and a layer of LoRA takes 190 launches."""
    few, many = seen(card(share=False)), seen(card(share=False, micro_batches=4))
    assert few["waits"] == many["waits"] == 2
    assert (many["sent"] - few["sent"]) <= 2 * 2
    assert (many["kernels"] - few["kernels"]) / 2 / few["layers"] <= 190


def test_fp32_goes_through_attention_piece_by_piece(card):
    found = seen(card(dtype="float32"))
    assert found["waits"] == 2 and "_varlen_attn" not in found["of"] and found["updated"] == found["trained"]


def test_a_tensor_left_on_the_host_is_found(card):
    done = card(fault="left on the host")
    assert done.returncode != 0 and "at least two devices" in done.stderr


def test_a_number_that_is_looked_at_is_found(card):
    assert seen(card(fault="looks at a number"))["waits"] == 2 + 2
