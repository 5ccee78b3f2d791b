"""A bit flips, or a file loses its end, in the newest checkpoint of a run.

    python -m benchmarks.disk.flips --trials 1000 --out benchmarks/results/disk-flips.json

Each trial damages one file of the newest of three checkpoints (files drawn evenly, then a bit or a length), opens the
checkpoints as a resume opens them, reads weights and moments, and mends the file again. It passes when the newest
checkpoint was passed over with a reason that names it and the one before it was taken; or when it was taken and all
that was read from it has the very values that were saved (a flip in a part of manifest.json that holds nothing).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..small import machine, write
from .run import SAVE_EVERY, STEPS, build, fitout, fresh


def main() -> None:
    from fitout.train.checkpoint import Checkpoints

    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--trials", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--work", type=Path, default=Path("build/disk"))
    asked = arguments.parse_args()
    work = asked.work.absolute()
    build(work)
    code, output = fitout(work, run := fresh(work / "flipped"), ("train.keep_last=3",))
    if code:
        sys.exit(output)
    checkpoints = Checkpoints(run / "checkpoints")
    truth = {step: values(checkpoints.at(step)) for step in (STEPS - SAVE_EVERY, STEPS)}
    draw, outcomes = random.Random(asked.seed), Counter[str]()
    failures: list[dict[str, Any]] = []
    for number in range(asked.trials):
        path = draw.choice(sorted(checkpoints.path(STEPS).iterdir()))
        kept = path.read_bytes()
        what = damage(path, kept, draw)
        try:
            taken, passed_over = checkpoints.newest()
            step = int(taken.folder.name.removeprefix("step-")) if taken else 0
            same = taken is not None and values(taken) == truth.get(step)
            said = any(f"step-{STEPS}" in line for line in passed_over)
            passed = same and (step == STEPS or said)
            outcomes[f"{path.name}: {'passed over, said' if step != STEPS else 'harmless'}"] += passed
            reason = (
                "" if passed else f"step {step} was taken, values {'the same' if same else 'differ'}, {passed_over}"
            )
        except Exception as error:  # anything but an answer is a failure
            reason = f"{type(error).__name__}: {error}"
        if reason:
            failures.append({"trial": number, "file": path.name, "damage": what, "problem": reason})
            print(failures[-1], flush=True)
        path.write_bytes(kept)
    result = {
        "machine": machine(1),
        "seed": asked.seed,
        "trials": asked.trials,
        "outcomes": dict(outcomes),
        "failures": failures,
    }
    write(asked.out, result)
    print(f"{asked.trials - len(failures)} of {asked.trials} passed; {dict(outcomes)}")
    sys.exit(bool(failures))


def values(checkpoint: Any) -> tuple[Any, ...]:
    """All that a resume reads: state, weights, moments, in a form that compares by bits."""
    tensors = {**checkpoint.weights(), **checkpoint.optimizer()}
    return repr(checkpoint.state), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def damage(path: Path, content: bytes, draw: random.Random) -> str:
    if draw.random() < 0.3:
        length = draw.randrange(len(content))
        path.write_bytes(content[:length])
        return f"cut to {length} of {len(content)} bytes"
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    path.write_bytes(changed)
    return f"bit {bit} of byte {at}"


if __name__ == "__main__":
    main()
