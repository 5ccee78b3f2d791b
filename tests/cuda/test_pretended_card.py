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
METHODS = {
    "lora": LORA,
    "lora of the head": {"kind": "lora", "rank": 8, "targets": ["q_proj", "lm_head"]},
    "dora": {"kind": "dora", "rank": 8},
    "qlora": {"kind": "qlora", "rank": 8},
    "adapter": {"kind": "adapter", "style": "houlsby", "reduction": 4},
    "sparse": {"kind": "sparse", "density": 0.02, "select": "random"},
    "full": {"kind": "full"},
}
PAIRS = ("orpo", "dpo", "simpo")
FAMILIES = ("qwen3", "mistral", "gemma2")  # norms of heads; a window; that, and a soft cap
CASES = {
    **{name: {"method": method} for name, method in METHODS.items()},
    **{family: {"method": LORA, "family": family} for family in FAMILIES},
    "fp32": {"method": LORA, "dtype": "float32"},
    "fp16": {"method": {"kind": "full"}, "dtype": "float16"},
    **{kind: {"method": LORA, "objective": kind} for kind in PAIRS},
    "pairs of full": {"method": {"kind": "full"}, "objective": "dpo"},
    "two": {"method": LORA, "share": False},
    "four": {"method": LORA, "share": False, "micro_batches": 4},
    "left on the host": {"method": LORA, "fault": "left on the host"},
    "looks at a number": {"method": LORA, "fault": "looks at a number"},
}
pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or bool(torch.version.cuda or torch.version.hip),
    reason="the card that is not there is built by g++, for a PyTorch without one",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What was seen of a step of each of CASES."""
    card, home = tmp_path_factory.mktemp("card") / "card.so", Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{home / 'include'}", HERE / "card.cpp", "-o", card,
         f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.step", json.dumps(list(CASES.values()))],
        env={**os.environ, "LD_PRELOAD": str(card), "OMP_NUM_THREADS": "1"}, cwd=HERE.parents[1], check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("name", [*METHODS, *FAMILIES, "fp32", "fp16"])
def test_a_step(seen, name):
    found = seen[name]
    assert "error" not in found, found
    assert found["elsewhere"] == [] and found["updated"] == found["trained"] > 0
    assert found["supervised"] == found["expected"]
    assert found["waits"] == 2  # the norm of the gradients and the loss, when all is launched


@pytest.mark.parametrize("name", [*PAIRS, "pairs of full"])
def test_a_step_on_pairs(seen, name):
    found = seen[name]
    assert "error" not in found, found
    assert found["elsewhere"] == [] and found["updated"] == found["trained"] > 0
    assert found["waits"] == 2 + 5  # and the sums of its five figures, at the end


@pytest.mark.parametrize("name", [*METHODS, "qwen3", "mistral", "fp16"])
def test_all_documents_go_through_one_kernel(seen, name):
    below = name == "adapter"  # nothing is trained below the lowest one, which stands behind attention
    found = seen[name]
    assert found["of"]["_varlen_attn"] == 2 * found["layers"]
    assert found["of"]["_varlen_attn_backward"] == 2 * (found["layers"] - below)


@pytest.mark.parametrize("name", ["fp32", "gemma2"])
def test_what_the_kernel_does_not_compute_goes_piece_by_piece(seen, name):
    assert "_varlen_attn" not in seen[name]["of"]


def test_what_each_micro_batch_costs(seen):
    """Two copies go over, and a layer of LoRA takes 207 launches, 16 of them to form again what it does not keep."""
    few, many = seen["two"], seen["four"]
    assert (many["sent"] - few["sent"]) <= 2 * 2
    assert (many["kernels"] - few["kernels"]) / 2 / few["layers"] <= 207


def test_a_tensor_left_on_the_host_is_found(seen):
    assert "at least two devices" in seen["left on the host"]["error"]


def test_a_number_that_is_looked_at_is_found(seen):
    assert seen["looks at a number"]["waits"] == 2 + 2
