"""One file operation of a run fails; then the same command is given again.

    python -m benchmarks.disk.faults --trials 100 --out benchmarks/results/disk-faults.json

An undisturbed run is counted first: every open for writing, write, fsync, rename, unlink, mkdir and truncate under the
run directory. Then operations evenly spread over them fail, one in each run, in turn with "no space left" (ENOSPC),
"input/output error" (EIO) and a short write (half taken, which is no error). A trial passes when

- the run ended with exit code 1 and a message that names a path in the run directory and the cause, without a
  traceback; or ended well, with the bytes of an undisturbed run;
- the same command without the fault then ends well with these bytes, and nothing half-written is left.

Exit code 1 when a trial does not pass. What is in --out is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..small import machine, write
from .run import adapter, build, fitout, fresh, half_written

HOW = ("ENOSPC", "EIO", "SHORT")
CAUSE = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--trials", type=int, default=150)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--work", type=Path, default=Path("build/disk"))
    arguments.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so long; go on later")
    asked = arguments.parse_args()
    work, until = asked.work.absolute(), time.monotonic() + asked.seconds
    build(work)
    result = json.loads(asked.out.read_text()) if asked.out.exists() else undisturbed(work)
    for number in range(len(result["trials"]), asked.trials):
        at = 1 + number * result["operations"] // asked.trials
        result["trials"].append(trial(work, at, HOW[number % 3], result["truth"]))
        write(asked.out, result)
        if result["trials"][-1]["problems"]:
            print(json.dumps(result["trials"][-1], indent=1), flush=True)
        if time.monotonic() > until:
            break
    passed = sum(not one["problems"] for one in result["trials"])
    print(f"{passed} of {len(result['trials'])} passed;", dict(Counter(t["ended"] for t in result["trials"])))
    sys.exit(passed < len(result["trials"]))


def undisturbed(work: Path) -> dict[str, Any]:
    hashes, counts = set(), []
    for _ in range(2):
        run, count = fresh(work / "whole"), fresh(work / "count")
        count.unlink(missing_ok=True)
        code, output = fitout(work, run, count=count)
        if code:
            sys.exit(f"the run does not end well even undisturbed:\n{output}")
        hashes.add(adapter(run))
        counts.append(sum(map(int, count.read_text().split())))
        count.unlink()
    if len(hashes) > 1:
        sys.exit(f"two undisturbed runs differ: {hashes}")
    return {"machine": machine(1), "operations": min(counts), "truth": hashes.pop(), "trials": []}


def trial(work: Path, at: int, how: str, truth: str) -> dict[str, Any]:
    run = fresh(work / "run")
    code, output = fitout(work, run, at=at, how=how)
    problems = []
    if code not in (0, 1):
        problems.append(f"exit code {code}")
    if "Traceback" in output:
        problems.append("a traceback")
    if code == 0 and adapter(run) != truth:
        problems.append("ended well with other weights")
    if code and how in CAUSE and (CAUSE[how] not in output or str(run) not in output):
        problems.append("the message does not name path and cause")
    if code and how == "SHORT":
        problems.append("stopped at a short write, which is no error")
    again, more = fitout(work, run)
    if again:
        problems.append(f"the same command again: exit code {again}")
    elif adapter(run) != truth:
        problems.append("the same command again: other weights")
    if half_written(run):
        problems.append(f"left half-written: {half_written(run)}")
    if problems:
        fresh(work / f"failed-{at}")
        run.rename(work / f"failed-{at}")
    message = output[-1500:] if code else ""
    return {
        "at": at,
        "how": how,
        "ended": code,
        "problems": problems,
        "message": message,
        "again": more[-800:] if again else "",
    }


if __name__ == "__main__":
    main()
