"""What oneDNN keeps for each product of a new size, by how much the process grows: writes `kernel_mb` into
fitout/plan/constants.json, for bf16 and for fp32 where oneDNN multiplies it.

    python -m benchmarks.planner_kernels
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from fitout.plan.machine import resident

from .planner_kept import CONSTANTS

WIDTH = 512


def main() -> None:
    constants = json.loads(CONSTANTS.read_text())
    for precision in ("fp32", "bf16"):
        command = [sys.executable, "-m", "benchmarks.planner_kernels", precision]  # a process that has kept nothing yet
        told = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(precision, told)
        if told:
            constants["memory"][precision]["kernel_mb"] = told
    CONSTANTS.write_text(json.dumps(constants, indent=1) + "\n")


def grown(precision: str) -> float:
    """MB for each of as many kernels as are kept: products and products for gradients, of every second length."""
    from fitout.model import blocks
    from fitout.model.memory import give_back
    from fitout.model.precision import KERNELS, faster_products, onednn_multiplies

    device, kind = torch.device("cpu"), torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(4 * KERNELS, WIDTH).to(kind), torch.randn(WIDTH, WIDTH).to(kind)
    with torch.no_grad(), blocks.reused(device), faster_products(device):
        if not (precision == "bf16" or onednn_multiplies()):
            return 0.0
        x @ weight, x.t() @ x
        give_back(device)
        before = resident()
        for length in range(2, KERNELS + 2, 2):
            x[:length] @ weight
            x[:length].t() @ x[:length]
        give_back(device)
        return round((resident() - before) / KERNELS / 2**20, 2)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(grown(sys.argv[1]))
    else:
        main()
