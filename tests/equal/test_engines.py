"""ddp, fsdp, zero1, zero2 and zero3 on two gloo ranks = one process: loss, gradients, checkpoints, what is saved; and a
run that goes from one rank to two and back. The whole table is `python -m benchmarks.engines`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitout.files import read_jsonl
from fitout.train.backend import Backend

from .engines_worker import FIRST, SECOND, TOTAL, gradients, part_of_a_run, whole_run
from .small import CPU, environment, losses

HERE = ("ddp:full", "ddp:lora", "fsdp:full", "fsdp:lora", "fsdp:patterns", "fsdp:dora", "fsdp:adapter")
OFF_LOADED = ("fsdp+offload:full", "zero2+offload:full")
DEEPSPEED = ("zero1:full", "zero1:sparse kept", "zero2:lora", "zero3:lora")


def two_ranks(folder: Path, pairs) -> None:
    ranks(folder, pairs, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])


def ranks(folder: Path, pairs, launcher=()) -> None:
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.equal.engines_worker", str(folder), *pairs],
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def compare(folder: Path, one: Path, pair: str) -> dict[str, float]:
    """Asserts that a pair gave what one process did; the largest differences."""
    kind = pair.split(":")[1]
    if not (one / kind).exists():
        found = gradients(one / kind / "gradients", Backend(CPU), kind)
        whole_run(one / kind / "whole", Backend(CPU), kind)
        save_file(found, one / kind / "gradients.safetensors")
    place, want = folder / pair, one / kind
    largest = {"gradients": close(place / "gradients.safetensors", want / "gradients.safetensors")}
    for run in ("whole", *(["elastic"] if (place / "elastic").exists() else [])):
        got_log, want_log = losses(place / run / "log.jsonl"), losses(want / "whole" / "log.jsonl")
        assert [step for step, _ in got_log] == list(range(1, TOTAL + 1))
        assert [x for _, x in got_log] == pytest.approx([x for _, x in want_log], abs=1e-5), (pair, run)
        assert rows(place / run, "supervised_tokens") == rows(want / "whole", "supervised_tokens"), (pair, run)
        validated = [
            [row["validation_loss"] for row in read_jsonl(d / "log.jsonl") if row.get("event") == "evaluated"]
            for d in (place / run, want / "whole")
        ]
        assert len(validated[0]) == 3 and validated[0] == pytest.approx(validated[1], abs=1e-5), (pair, run)
        for file in (f"checkpoints/step-{TOTAL}/weights", f"checkpoints/step-{TOTAL}/optimizer", saved(want)):
            name = f"{run} {file.rpartition('/')[2]}"
            largest[name] = close(place / run / f"{file}.safetensors", want / "whole" / f"{file}.safetensors")
        largest[f"{run} loss"] = max(abs(a - b) for (_, a), (_, b) in zip(got_log, want_log, strict=True))
    return largest


def saved(run: Path) -> str:
    adapter = (run / "whole" / "result" / "adapter_model.safetensors").exists()
    return "result/adapter_model" if adapter else "result/model"


def rows(run: Path, key: str) -> list:
    return [row[key] for row in read_jsonl(run / "log.jsonl") if "event" not in row]


def close(got: Path, want: Path) -> float:
    """The largest difference between two files of tensors that must hold the same names, whole."""
    got_tensors, want_tensors = load_file(got), load_file(want)
    assert got_tensors.keys() == want_tensors.keys() and got_tensors, got
    for name, tensor in want_tensors.items():
        assert got_tensors[name].shape == tensor.shape, (str(got), name)
        torch.testing.assert_close(got_tensors[name], tensor, rtol=0, atol=1e-5, msg=f"{got}: {name}")
    return max(float((got_tensors[n].double() - t.double()).abs().max()) for n, t in want_tensors.items())


@pytest.mark.parametrize("pairs", [HERE, DEEPSPEED], ids=["torch", "deepspeed"])
def test_two_ranks_equal_one_process_and_runs_go_on_with_any_number(tmp_path, pairs):
    if pairs is DEEPSPEED and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'fitout[deepspeed]'")
    elastic = [pair for pair in pairs if pair.endswith((":full", ":lora"))]
    for pair in elastic:  # one rank
        part_of_a_run(tmp_path / "two" / pair / "elastic", Backend(CPU), pair.split(":")[1], FIRST)
    two_ranks(tmp_path / "two", pairs)
    for pair in elastic:  # one again
        assert (tmp_path / "two" / pair / "elastic" / "checkpoints" / f"step-{SECOND}").exists()
        part_of_a_run(tmp_path / "two" / pair / "elastic", Backend(CPU), pair.split(":")[1], TOTAL)
    for pair in pairs:
        print(pair, compare(tmp_path / "two", tmp_path / "one", pair))


@pytest.mark.parametrize("pair", OFF_LOADED)
def test_over_one_process_and_off_loaded(tmp_path, pair):
    """No launcher: what does not fit beside the model goes to main memory."""
    if "zero" in pair and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'fitout[deepspeed]'")
    ranks(tmp_path / "engine", [pair])
    print(pair, compare(tmp_path / "engine", tmp_path / "one", pair))
