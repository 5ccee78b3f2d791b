"""Fitout, TRL's SFTTrainer, transformers' Trainer and, where they are installed, LLaMA-Factory and torchtune in turn on
the same work.

    python -m benchmarks.against_trl --out benchmarks/results/NAME.json

Every run is a process of its own, so that memory peaks and start-up are real. This process imports no library: what
it holds would count in its children's peaks. The protocol is in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from .work import BATCH, SHAPES, STEP

WARMUP = 3
RANK, LENGTH = 16, 1024
FIRST = {"fp32": 1e-4, "bf16": 5e-3}  # largest difference of the losses of step 1
CURVE = {"fp32": 1e-3, "bf16": 2e-2}  # and of all steps
CANDIDATES = (  # our best effort for TRL: without recomputation, and these ways to cut a step into device batches
    "per=2,recompute=0,sort=1", "per=4,recompute=0,sort=1", "per=8,recompute=0,sort=1", "per=16,recompute=0",
    "per=4,recompute=0,sort=1,free=1",
)  # fmt: skip
ELSEWHERE = {  # what has an environment of its own: its module here, its default's options, the packages to name
    "llama-factory": ("side_llama_factory", "", ("llamafactory", "torch", "transformers", "peft")),
    "torchtune": ("side_torchtune", "per=2", ("torchtune", "torch", "torchao")),
}
SPEED = ("flops_per_second", "matmul_peak")  # of a whole training, as Fitout tells them
BF16_BASE = "base=bf16"  # of frozen weights: spares their cast in every forward (trained ones would lose small updates)


def main() -> None:
    asked = _arguments()
    with tempfile.TemporaryDirectory(prefix="fitout-benchmark-") as name:
        folder = Path(name)
        child("work", folder, asked.shape, asked.precision, asked.steps, asked.method, asked.data, RANK, asked.length)
        work = json.loads((folder / "work.json").read_text())
        tuning, best = {}, asked.best
        if asked.tune:
            tuning, best = _tune(folder, work, asked)
        sides = {"fitout": None, "trl default": "", "trl best": best, "trainer best": f"{best},trainer=plain,free=0"}
        if asked.onednn:
            sides["trl best onednn"] = f"{best},onednn=1"
        pythons = {"llama-factory": asked.llama_factory, "torchtune": asked.torchtune}
        for peer, (_, default, _) in ELSEWHERE.items():
            if pythons[peer]:
                sides |= {f"{peer} default": default, f"{peer} best": f"{best},free=0"}
        if asked.sides is not None:
            sides = {name: sides[name] for name in ("fitout", *asked.sides)}
        rounds = [round_of(folder, work, sides, asked.warmup, number, pythons) for number in range(asked.rounds)]
    result = {
        "shape": asked.shape, "method": asked.method, "data": asked.data, "precision": asked.precision,
        "steps": asked.steps, "warmup": asked.warmup, "quick": asked.quick, "work": work, "trl_best": best,
        "tuning": tuning, "machine": machine(), "rounds": rounds,
        "elsewhere": {peer: _versions_of(python, ELSEWHERE[peer][2]) for peer, python in pythons.items() if python},
        "parity": {side: parity(rounds, side, work) for side in sides if side != "fitout"},
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["parity"], indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="30m")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--data", choices=(*BATCH, *STEP), default="alpaca")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sample at most, of a block")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="steps left out of the speed")
    parser.add_argument("--best", default="per=4,recompute=0,sort=1", help="TRL's best setting, where it is known")
    parser.add_argument("--tune", action="store_true", help="find TRL's best setting first, by trying the candidates")
    parser.add_argument(
        "--sides", nargs="*", help="peers to run, of: 'trl default', 'trl best', 'trainer best', with --onednn 'trl "
        "best onednn' and, where the Python is given, 'llama-factory default', 'llama-factory best', 'torchtune "
        "default', 'torchtune best'; else all"
    )  # fmt: skip
    parser.add_argument("--onednn", action="store_true", help="TRL also with fp32 products by oneDNN (see side_trl.py)")
    parser.add_argument("--llama-factory", metavar="PYTHON", help="the Python of an environment that has LLaMA-Factory")
    parser.add_argument("--torchtune", metavar="PYTHON", help="the Python of an environment that has torchtune")
    parser.add_argument("--quick", action="store_true", help="3 steps, 1 round: does it run and agree")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.quick:
        asked.steps, asked.rounds, asked.warmup = 3, 1, 1
    if asked.steps <= asked.warmup:
        parser.error("--steps must be larger than --warmup")
    if _stored_in_bf16(asked) and "base=" not in asked.best:
        asked.best += "," + BF16_BASE
    return asked


def _stored_in_bf16(asked: argparse.Namespace) -> bool:
    return asked.precision == "bf16" and asked.method == "lora"


def round_of(
    folder: Path,
    work: dict[str, Any],
    sides: dict[str, str | None],
    warmup: int,
    number: int,
    pythons: Mapping[str, str | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """Each side once; the order is turned around every other round."""
    order = list(sides) if number % 2 == 0 else list(sides)[::-1]
    return {side: measure(folder, work, side, sides[side], warmup, pythons.get(_peer(side))) for side in order}


def measure(
    folder: Path, work: dict[str, Any], side: str, options: str | None, warmup: int, python: str | None = None
) -> dict[str, Any]:
    """One run in a fresh process, of another `python` where one is given. A step lasts from the end of the one before
    it; speeds are medians after warm-up."""
    out = folder / "result.json"
    began = time.time()
    if options is None:
        child("side_fitout", folder, out)
    else:
        module = ELSEWHERE[_peer(side)][0] if _peer(side) in ELSEWHERE else "side_trl"
        child(module, folder, out, options, python=python)
    raw = json.loads(out.read_text())
    seconds = [b - a for a, b in zip(raw["ends"], raw["ends"][1:], strict=False)]
    steps = list(zip(work["steps"][1:], seconds, strict=False))[max(0, warmup - 1) :]
    result = {
        "supervised_tokens_per_second": round(median(s["supervised"] / t for s, t in steps), 1),
        "tokens_per_second": round(median(s["tokens"] / t for s, t in steps), 1),
        "peak_memory_mb": round(max(raw["peaks"])),
        "start_to_first_step_s": round(raw["ends"][0] - began, 2),
        "step_seconds": [round(t, 3) for t in seconds],
        "losses": raw["losses"],
        "computed_tokens": raw["computed"],
        "same_rows": raw["hashes"] == [s["hash"] for s in work["steps"]],
        "load_before": round(os.getloadavg()[0], 2),
        **{key: raw[key] for key in SPEED if key in raw},
    }
    print(
        f"{side:12} {result['supervised_tokens_per_second']:9,.1f} supervised tokens/s",
        f"{result['peak_memory_mb']:6,} MB",
        f"first step {result['start_to_first_step_s']:5.1f} s",
        "" if result["same_rows"] else "OTHER ROWS",
        flush=True,
    )
    return result


def _peer(side: str) -> str:
    return side.rpartition(" ")[0]


def _tune(folder: Path, work: dict[str, Any], asked: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Each candidate once; the fastest that sees the same rows."""
    speeds = {}
    for options in CANDIDATES:
        options += f",{BF16_BASE}" if _stored_in_bf16(asked) else ""
        run = measure(folder, work, options, options, asked.warmup)
        if run["same_rows"]:
            speeds[options] = run["supervised_tokens_per_second"]
    return speeds, max(speeds, key=lambda options: speeds[options])


def parity(rounds: list[dict[str, Any]], side: str, work: dict[str, Any]) -> dict[str, Any]:
    """Whether the two sides trained the same thing: rows, loss of step 1, and the whole curve."""
    ours, theirs = [r["fitout"] for r in rounds], [r[side] for r in rounds]
    curves = [(x["losses"], y["losses"]) for x, y in zip(ours, theirs, strict=True)]
    gaps = [abs(a - b) for x, y in curves for a, b in zip(x, y, strict=True)]
    first = max(abs(x[0] - y[0]) for x, y in curves)
    rows = all(run["same_rows"] for run in [*ours, *theirs])
    precision = work["precision"]
    equal = rows and first <= FIRST[precision] and max(gaps) <= CURVE[precision]
    return {"same_rows": rows, "step_1_gap": first, "largest_gap": max(gaps), "same_training": equal}


def child(module: str, *arguments: object, python: str | None = None) -> None:
    command = [python or sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")


def machine() -> dict[str, Any]:
    told = [line.partition(":") for line in _lines("/proc/cpuinfo")]
    first = {name.strip(): said.strip() for name, _, said in reversed(told)}
    name = first.get("model name", platform.machine())  # which several generations share
    if "cpu family" in first:
        name += f", family {first['cpu family']} model {first['model']}"
    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **({"gpu": _gpu()} if _gpu() else {}),
        **{name: _version(name) for name in packages},
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    """The name of the first card; asked of the driver, as this process imports no library."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip()


def _versions_of(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """What the other environment has."""
    code = (
        f"import json; from importlib.metadata import version; print(json.dumps({{p: version(p) for p in {packages}}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
