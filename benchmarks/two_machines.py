"""Two machines on one: network namespaces joined by a virtual cable, each with a rank, on the embedded model.

    python -m benchmarks.two_machines [cut]

Needs root and `ip` (iproute2). What is tried: a whole run; every process of the second machine killed at once; the
cable cut, so that nothing answers and nothing is refused. After each the run goes on, on one machine, and must end as
if nothing had happened (fp32, losses and adapter within 1e-5).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

HOSTS = {"fitout-a": "10.77.0.1", "fitout-b": "10.77.0.2"}
STEPS, KILL_AT, HANG_AFTER = 60, 20, 10
RECIPE = """\
name: two
model: {base: "embedded:shell"}
data: {sources: [{path: rows.jsonl}], split: {train: 0.9, validation: 0.1, test: 0}, max_length: 64}
method: {kind: lora, rank: 4, alpha: 8}
train: {max_steps: 60, batch_size: 4, lr: 1.0e-3, precision: fp32, save_every: 5, evaluate_every: 30, listeners: [],
  hang_after: 10}
"""


@contextmanager
def machines():
    """Two namespaces, joined; gone afterwards."""
    first, second = HOSTS
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "fitout-va", "netns", first, "type", "veth", "peer", "name", "fitout-vb", "netns", second)
        for name, end in zip(HOSTS, ("fitout-va", "fitout-vb"), strict=True):
            ip("-n", name, "address", "add", f"{HOSTS[name]}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def fitout(run: Path, *more: str, machine: str | None = None) -> subprocess.Popen:
    inside = ["ip", "netns", "exec", machine] if machine else []
    command = [*inside, sys.executable, "-m", "fitout", "train", str(run.parent / "recipe.yaml"), f"--out={run}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def both(run: Path) -> dict[str, subprocess.Popen]:
    meeting = f"--rendezvous={HOSTS['fitout-a']}:29500"
    return {name: fitout(run, "--processes=1", "--nodes=2", meeting, machine=name) for name in HOSTS}


def wait_for(run: Path, step: int, started: dict[str, subprocess.Popen]) -> None:
    while len(losses(run)) < step:
        for process in started.values():
            if process.poll() is not None:
                raise SystemExit(f"ended too early:\n{process.communicate()[0]}")
        time.sleep(0.02)


def losses(run: Path) -> list[float]:
    log = run / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return [row["loss"] for row in rows if "event" not in row]


def kill_everything(machine: str) -> None:
    """As when the power fails, but with the network still answering for the dead: every process, at once."""
    listed = subprocess.run(["ip", "netns", "pids", machine], check=True, capture_output=True, text=True)
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def cut_the_cable(machine: str) -> None:
    ip("-n", machine, "link", "set", "fitout-vb", "down")


def ends(started: dict[str, subprocess.Popen]) -> dict[str, tuple[int, float, str]]:
    """Exit code, seconds and last words of each."""
    begin, found = time.monotonic(), {}
    for name, process in started.items():
        output, _ = process.communicate(timeout=300)
        found[name] = (process.returncode, time.monotonic() - begin, output)
    return found


def difference(run: Path, want: Path) -> float:
    assert len(losses(run)) == len(losses(want)) == STEPS
    largest = max(abs(a - b) for a, b in zip(losses(run), losses(want), strict=True))
    file = "adapter/adapter_model.safetensors"
    got, wanted = load_file(run / file), load_file(want / file)
    assert got.keys() == wanted.keys()
    return max([largest, *(float((got[n] - wanted[n]).abs().max()) for n in wanted)])


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fitout-two-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        rows = [{"instruction": f"What is {i // 8} plus {i % 8}?", "output": str(i // 8 + i % 8)} for i in range(120)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        one = fitout(folder / "one")
        output, _ = one.communicate(timeout=600)
        assert one.returncode == 0, output

        print("| what | first machine | second machine | largest difference after going on |\n|---|---|---|---|")
        strikes = (("all processes killed", kill_everything), ("cable cut", cut_the_cable))
        if sys.argv[1:] == ["cut"]:
            strikes = strikes[1:]
        else:
            with machines():
                found = ends(both(folder / "whole"))
                assert [code for code, _, _ in found.values()] == [0, 0], found
                print(f"| whole run | exit 0 | exit 0 | {difference(folder / 'whole', folder / 'one'):.1e} |")
        for what, strike in strikes:
            run = folder / what.replace(" ", "-")
            with machines():
                started = both(run)
                wait_for(run, KILL_AT, started)
                strike("fitout-b")
                found = ends(started)
            again = fitout(run, "--resume")
            output, _ = again.communicate(timeout=600)
            assert again.returncode == 0, output
            cells = [f"exit {code} after {seconds:.0f} s" for code, seconds, _ in found.values()]
            print(f"| {what} | {' | '.join(cells)} | {difference(run, folder / 'one'):.1e} |", flush=True)
            print("\n".join(f"    {machine}: {line}" for machine, (_, _, said) in found.items()
                            for line in said.splitlines() if line.startswith(("error", "     "))))  # fmt: skip


if __name__ == "__main__":
    main()
